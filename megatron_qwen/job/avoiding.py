"""Which nodes a job can avoid: as many as leave enough others that it can still be scheduled."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_qwen import slurm

# How scontrol prints that a field has no value.
_NONE = (None, "", "(null)")


@dataclass(frozen=True)
class Avoided:
    """What came of the wish to avoid nodes.

    Args:
        nodes: that Slurm keeps the job from.
        others: nodes that it does not, though that was wanted.
        why_not: why.
    """

    nodes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    why_not: str = ""

    def __str__(self) -> str:
        """For a log: what is in force, and what is not."""
        kept = f"excluded nodes: {', '.join(self.nodes)}" if self.nodes else ""
        others = f"not excluded: {', '.join(self.others)} ({self.why_not})" if self.others else ""
        return "; ".join(part for part in (kept, others) if part)


@dataclass(frozen=True)
class Places:
    """Where a job can run.

    Args:
        nodes: fields of the nodes that Slurm shows, as ``scontrol show node`` has them.
        unseen: of every partition that the job may run in, the number of nodes that Slurm does not show.
        gpus: that a node must have.
    """

    nodes: Mapping[str, dict[str, str]]
    unseen: Mapping[str, int]
    gpus: int = 0

    def members(self, partition: str) -> set[str]:
        """Nodes of a partition that Slurm shows and that fit the job."""
        return {
            name
            for name, node in self.nodes.items()
            if partition in node.get("Partitions", "").split(",") and sum(slurm.gpus_of(node).values()) >= self.gpus
        }

    def left(self, avoided: Collection[str]) -> int:
        """Nodes of the largest partition that the job could run on now: none that are down, drained or avoided.

        Nodes that Slurm does not show (cloud nodes that are powered down) count: it starts them when they are needed.
        """
        return max(
            (
                unseen + sum(slurm.is_usable(self.nodes[node]) for node in self.members(name) - set(avoided))
                for name, unseen in self.unseen.items()
            ),
            default=0,
        )


def avoidable(wanted: Sequence[str], *, fixed: Iterable[str], places: Places, needed: int) -> Avoided:
    """The nodes to exclude.

    Args:
        wanted: nodes to avoid, the best proven first: the last ones are given up first.
        fixed: nodes that are excluded in any case, by a person.
        places: where the job can run.
        needed: nodes that the job needs.

    Returns:
        ``nodes`` without the fixed ones. Nodes of other partitions are left out without a word.
    """
    fitting = set[str]().union(*(places.members(name) for name in places.unseen))
    kept, given_up = list[str](), list[str]()
    always = set(fixed)
    for node in dict.fromkeys(wanted):
        if node not in fitting or node in always:
            continue
        # A node that is down costs nothing to exclude.
        costs = slurm.is_usable(places.nodes[node])
        if costs and places.left({*always, *kept, node}) < needed:
            given_up.append(node)
        else:
            kept.append(node)
    if not given_up:
        return Avoided(tuple(kept))
    left = places.left({*always, *kept})
    why = f"the job needs {needed} nodes, and {left} are up that are not excluded"
    return Avoided(tuple(kept), tuple(given_up), why)


def places_of(
    partitions: Collection[str], *, gpus: int, reservation: str | None = None, feature: str | None = None
) -> Places:
    """Asks Slurm.

    Args:
        partitions: that the job may run in.
        gpus: that a node must have.
        reservation: that the job runs in; None or ``(null)`` for none.
        feature: that a node must have. Of an expression nothing is known here.

    Raises:
        SlurmError: it does not answer.
    """
    shown, nodes = slurm.show_partitions(), slurm.show_nodes()
    unseen = {}
    for name in partitions:
        if name in shown:
            there = sum(name in node.get("Partitions", "").split(",") for node in nodes.values())
            unseen[name] = slurm.unseen_nodes(shown[name], there)
    if reservation not in _NONE:
        held = slurm.fields(slurm.ask("scontrol", "show", "reservation", "-o", str(reservation)))
        reserved = set(slurm.hostnames(held.get("Nodes", "")))
        nodes = {name: node for name, node in nodes.items() if name in reserved}
    if feature not in _NONE and str(feature).isidentifier():
        nodes = {name: node for name, node in nodes.items() if feature in node.get("AvailableFeatures", "").split(",")}
    if reservation not in _NONE or feature not in _NONE:
        unseen = dict.fromkeys(unseen, 0)  # whether these are reserved, or have the feature, is not known
    return Places(nodes, unseen, gpus)
