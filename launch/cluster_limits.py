"""Whether the cluster takes such a job at all: asked of Slurm before submission."""

from collections.abc import Iterator
from dataclasses import replace

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
    try:
        all_enforced = len(names) > 1 and slurm.enforces_limits_of_all_partitions()
    except UserError as failure:
        return [error(problem) for problem in failure.problems]
    states = {one: list(_state(one, partitions[one])) for one in names}
    limits = {one: list(_limits(request, one, partitions[one], nodes)) for one in names}
    # A job may be queued for a partition that is DOWN, so that is no limit.
    exceeded = [item for found in limits.values() for item in found if item.severity == "error"]
    if all_enforced and exceeded:
        why = "With EnforcePartLimits=ALL, as here, every partition of the list must allow the job."
        return [error(replace(item.problem, fix=f"{item.problem.fix} {why}")) for item in exceeded]
    # Otherwise Slurm starts the job in the first of the partitions that can run it: one that takes it is enough.
    both = [[*states[one], *limits[one]] for one in names]
    taking = [found for found in both if not any(item.severity == "error" for item in found)]
    if taking:
        return min(taking, key=len)
    return [item for found in both for item in found]


def array_limit(tasks: int) -> list[Problem]:
    """Whether the cluster takes an array of so many tasks. One task is submitted as a job without an array."""
    largest = slurm.largest_array()
    if largest is None or tasks <= max(1, largest):
        return []
    if largest == 0:
        fix = "need a job array, which this cluster has turned off (MaxArraySize=0); submit them one by one."
    else:
        fix = f"are more than an array of this cluster may have (MaxArraySize allows {largest}); divide them."
    return [Problem("runs", tasks, fix)]


def _state(name: str, partition: dict[str, str]) -> Iterator[Finding]:
    if partition.get("State") != "UP":
        yield error(Problem("partition", name, f"is {partition.get('State')}; use another, or wait until it is UP."))


def _limits(
    request: SubmitRequest, name: str, partition: dict[str, str], nodes: dict[str, dict[str, str]]
) -> Iterator[Finding]:
    cluster = request.cluster
    limit = slurm.minutes(partition.get("MaxTime", ""))
    if limit is not None and cluster.time_limit_minutes > limit:
        fix = f"exceeds the {partition['MaxTime']} of partition {name}; a longer run resumes in its next job."
        yield error(Problem("time_limit", cluster.time_limit, fix))
    largest = partition.get("MaxNodes", "UNLIMITED")
    if largest.isdecimal() and request.job_nodes > int(largest):
        yield error(Problem(_asked(request), request.job_nodes, f"partition {name} allows {largest} a job."))
    members = {key: node for key, node in nodes.items() if name in node.get("Partitions", "").split(",")}
    # Cloud nodes that are powered down count in TotalNodes. They are not shown unless slurm.conf has PrivateData=cloud.
    unseen = slurm.unseen_nodes(partition, len(members))
    total = len(members) + unseen
    if request.job_nodes > total:
        yield error(Problem(_asked(request), request.job_nodes, f"partition {name} has {total} nodes."))
        return
    fitting = {key: node for key, node in members.items() if _gpus(node, cluster.gpu_type) >= cluster.gpus_per_node}
    if len(fitting) + unseen < request.job_nodes:
        kind = f"{cluster.gpu_type} " if cluster.gpu_type else ""
        hidden = f" ({unseen} are not shown)" if unseen else ""
        needed = f"{request.job_nodes} are needed"
        fix = f"{len(fitting)} nodes of partition {name} have that many {kind}GPUs{hidden}, {needed}."
        yield error(Problem("gpus_per_node", cluster.gpus_per_node, fix))
        return
    usable = sum(slurm.is_usable(node) for node in fitting.values())
    if usable >= request.job_nodes:
        return
    if unseen:
        fix = (
            f"Slurm shows {len(members)} of the {total} nodes of partition {name}, and {usable} of these fit and are "
            "up. The others may be powered down; whether they fit is not known. If they do not, sbatch refuses the job."
        )
    else:
        fix = f"{usable} of {len(fitting)} fitting nodes of partition {name} are up: the job will wait for the others."
    yield warning(Problem(_asked(request), request.job_nodes, fix))


def _asked(request: SubmitRequest) -> str:
    return "--nodes + --spares" if request.spares else "--nodes"


def _gpus(node: dict[str, str], kind: str | None) -> int:
    found = slurm.gpus_of(node)
    return sum(found.values()) if kind is None else found.get(kind, 0)
