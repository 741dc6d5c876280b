"""Whether the cluster takes such a job at all: asked of Slurm before submission."""

from collections.abc import Iterator

from launch.finding import Finding, error, warning
from launch.request import SubmitRequest
from megatron_qwen import slurm
from megatron_qwen.errors import Problem, UserError, did_you_mean


def cluster_limits(request: SubmitRequest) -> list[Finding]:
    """Partition, node count, time limit and GPUs against what Slurm says of itself."""
    try:
        partitions, nodes = slurm.show_partitions(), slurm.show_nodes()
    except UserError as failure:
        return [error(problem) for problem in failure.problems]
    cluster = request.cluster
    name = cluster.partition or next((key for key, part in partitions.items() if part.get("Default") == "YES"), None)
    if name is None:
        fix = f"must be given: this cluster has no default partition. It has {', '.join(partitions)}."
        return [error(Problem("partition", None, fix))]
    names = [one.strip() for one in name.split(",")]
    if unknown := [one for one in names if one not in partitions]:
        there = f"This cluster has {', '.join(partitions)}."
        fixes = {one: f"no such partition.{did_you_mean(one, partitions)} {there}" for one in unknown}
        return [error(Problem("partition", one, fix)) for one, fix in fixes.items()]
    # Slurm starts the job in the first of the partitions that can run it: one that takes it is enough.
    found = {one: list(_limits(request, one, partitions[one], nodes)) for one in names}
    taking = [findings for findings in found.values() if not any(item.severity == "error" for item in findings)]
    if taking:
        return min(taking, key=len)
    return [item for findings in found.values() for item in findings]


def array_limit(tasks: int) -> list[Problem]:
    """Whether the cluster takes an array of so many tasks."""
    largest = slurm.largest_array()
    if largest is None or tasks <= largest:
        return []
    fix = f"are more than an array of this cluster may have (MaxArraySize allows {largest}); divide them."
    return [Problem("runs", tasks, fix)]


def _limits(
    request: SubmitRequest, name: str, partition: dict[str, str], nodes: dict[str, dict[str, str]]
) -> Iterator[Finding]:
    cluster = request.cluster
    if partition.get("State") != "UP":
        yield error(Problem("partition", name, f"is {partition.get('State')}; use another, or wait until it is UP."))
    limit = slurm.minutes(partition.get("MaxTime", ""))
    if limit is not None and cluster.time_limit_minutes > limit:
        fix = f"exceeds the {partition['MaxTime']} of partition {name}; a longer run resumes in its next job."
        yield error(Problem("time_limit", cluster.time_limit, fix))
    largest = partition.get("MaxNodes", "UNLIMITED")
    if largest.isdecimal() and request.nodes > int(largest):
        yield error(Problem("--nodes", request.nodes, f"partition {name} allows {largest} a job."))
    members = {key: node for key, node in nodes.items() if name in node.get("Partitions", "").split(",")}
    if request.nodes > len(members):
        yield error(Problem("--nodes", request.nodes, f"partition {name} has {len(members)} nodes."))
        return
    fitting = {key: node for key, node in members.items() if _gpus(node, cluster.gpu_type) >= cluster.gpus_per_node}
    if len(fitting) < request.nodes:
        kind = f"{cluster.gpu_type} " if cluster.gpu_type else ""
        fix = f"{len(fitting)} nodes of partition {name} have that many {kind}GPUs, {request.nodes} are needed."
        yield error(Problem("gpus_per_node", cluster.gpus_per_node, fix))
        return
    usable = sum(slurm.is_usable(node) for node in fitting.values())
    if usable < request.nodes:
        fix = f"{usable} of {len(fitting)} fitting nodes of partition {name} are up: the job will wait for the others."
        yield warning(Problem("--nodes", request.nodes, fix))


def _gpus(node: dict[str, str], kind: str | None) -> int:
    found = slurm.gpus_of(node)
    return sum(found.values()) if kind is None else found.get(kind, 0)
