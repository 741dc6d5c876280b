"""Nodes in quarantine that a submission keeps its jobs from."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.request import SubmitRequest
from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from megatron_qwen.job.avoiding import Avoided, avoidable, places_of
from megatron_qwen.resilience.quarantine import Quarantine, QuarantinedNode

# Options of sbatch that name nodes, by their long and their short names.
EXCLUDE, _NAMED = ("exclude", "x"), ("nodelist", "w", "nodefile", "F")


@dataclass(frozen=True)
class ToAvoid:
    """What is asked of sbatch.

    Args:
        nodes: to exclude.
        notes: what a person should know, a line each.
    """

    nodes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def to_avoid(request: SubmitRequest) -> ToAvoid:
    """The nodes in quarantine that can be spared.

    Nothing here prevents a submission: what cannot be read or asked is a note.
    """
    cluster = request.cluster
    if cluster.scheduler != "slurm" or not cluster.quarantine_hours:
        return ToAvoid()
    try:
        store = Quarantine(cluster.quarantine)
        notes, known = store.read()[1], store.in_force()
    except OSError as error:
        return ToAvoid(notes=(f"the quarantine cannot be read ({error}); no node is avoided",))
    if not known:
        return ToAvoid(notes=tuple(notes))
    if named := next((name for name in _NAMED if name in cluster.sbatch), None):
        notes.append(f"nodes in quarantine are not avoided: the cluster file names the nodes (sbatch: {named})")
        return ToAvoid(notes=tuple(notes))
    try:
        chosen = _chosen(request, [entry.node for entry in known])
    except UserError as error:
        notes.append(f"nodes in quarantine are not avoided: {'; '.join(map(str, error.problems))}")
        return ToAvoid(notes=tuple(notes))
    return ToAvoid(chosen.nodes, (*notes, *_told(chosen, known, root=cluster.quarantine.parent)))


def _chosen(request: SubmitRequest, wanted: Sequence[str]) -> Avoided:
    cluster = request.cluster
    partitions = [cluster.partition] if cluster.partition else _defaults()
    places = places_of(
        [name for text in partitions for name in text.split(",")],
        gpus=cluster.gpus_per_node,
        reservation=cluster.reservation,
        feature=cluster.constraint,
    )
    return avoidable(wanted, fixed=_excluded_by_file(request), places=places, needed=request.job_nodes)


def _defaults() -> list[str]:
    return [name for name, partition in slurm.show_partitions().items() if partition.get("Default") == "YES"]


def _excluded_by_file(request: SubmitRequest) -> list[str]:
    """Nodes that the cluster file excludes."""
    try:
        return [node for name in EXCLUDE for node in slurm.hostnames(request.cluster.sbatch.get(name, ""))]
    except ValueError:  # no list of nodes; sbatch will say so
        return []


def _told(chosen: Avoided, known: Sequence[QuarantinedNode], *, root: Path) -> list[str]:
    by_name = {entry.node: entry for entry in known}
    lines = [f"avoids {node} until {by_name[node].until}: {by_name[node].why}" for node in chosen.nodes]
    if chosen.others:
        lines.append(f"does not avoid {', '.join(chosen.others)}, in quarantine: {chosen.why_not}")
    where = f"nodes in quarantine: mq launch nodes --run-root {shlex.quote(str(root))}"
    return [*lines, where] if lines else []
