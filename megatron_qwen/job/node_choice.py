"""Which nodes of a job run the next attempt: the first healthy ones; the others are spares."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeChoice:
    """Nodes of an attempt.

    Args:
        used: run the ranks, in the order of the allocation.
        spare: healthy ones that run none.
    """

    used: tuple[str, ...]
    spare: tuple[str, ...]


def choose(tasks: Mapping[str, int], wanted: Sequence[int], unfit: Collection[str]) -> NodeChoice | None:
    """The first fit nodes of an allocation.

    Args:
        tasks: tasks that Slurm allows on every node of the job, in the order of the allocation.
        wanted: tasks of every node that is used, in the order of the ranks.
        unfit: nodes that must not be used.

    Returns:
        None if too few nodes are fit, or if the ranks would be divided among them in another way: a rank would then
        find other ranks on its node than its layout says.
    """
    fit = [node for node in tasks if node not in unfit]
    used = fit[: len(wanted)]
    if [tasks[node] for node in used] != list(wanted):
        return None
    return NodeChoice(tuple(used), tuple(fit[len(wanted) :]))
