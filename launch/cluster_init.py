"""``mq launch cluster-init``: asks a cluster what it is and drafts its file."""

from collections import Counter

from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem

_KNOWN_GPUS = ("B200", "H200", "H100", "A100")


def draft(partition: str | None = None) -> str:
    """The text of a cluster file for a partition, by default the cluster's default one.

    Raises:
        SlurmError: Slurm does not answer.
        ConfigError: there is no such partition.
    """
    partitions, nodes = slurm.show_partitions(), slurm.show_nodes()
    name = partition or next((key for key, part in partitions.items() if part.get("Default") == "YES"), None)
    name = name or next((key for key, part in partitions.items() if part.get("Hidden") != "YES"), None)
    if name is None or name not in partitions:
        raise ConfigError(Problem("--partition", name, f"no such partition; there are {', '.join(partitions)}."))
    members = [node for node in nodes.values() if name in node.get("Partitions", "").split(",")]
    shapes = Counter(_shape(node) for node in members)
    (kind, gpus, cpus, memory_mb), count = shapes.most_common(1)[0] if shapes else (("", 0, 1, 0), 0)
    ranks = gpus or 1
    limit = partitions[name].get("MaxTime", "UNLIMITED")
    accounts = sorted({node.get("Features", "") for node in members} - {"", "(null)"})
    known = next((gpu for gpu in _KNOWN_GPUS if gpu.lower() in kind.lower()), None)
    lines = [
        f"# Drafted from what Slurm reports about partition {name}; {count} of its {len(members)} nodes are like this.",
        "# Review it: docs/slurm.md describes every field.",
        "scheduler: slurm",
        f"partition: {name}",
        *_others(partitions, name),
        "# account: null",
        "# qos: null",
        *([f"# constraint: null    # nodes have the features {', '.join(accounts)}"] if accounts else []),
        f"gpus_per_node: {gpus}",
        *([f"gpu_type: {kind}"] if kind else []),
        f"gpu: {known}" if known else "# gpu: null    # B200, H200, H100 or A100, for the estimates",
        f"cpus_per_rank: {max(1, cpus // ranks)}",
        f"# memory_per_rank_gib: {memory_mb / 1024 / ranks:.0f}",
        f"time_limit: {limit if slurm.minutes(limit) else '1-00:00:00'}",
        f"exclusive: {'true' if gpus else 'false'}",
        f"signal_delay_s: {300 if gpus else 120}",
        "run_root: runs    # on a file system that all nodes share",
        "environment: {}    # NCCL_SOCKET_IFNAME, NCCL_IB_HCA, FI_PROVIDER, ...",
    ]
    return "\n".join(lines) + "\n"


def _others(partitions: dict[str, dict[str, str]], chosen: str) -> list[str]:
    others = [name for name in partitions if name != chosen]
    return [f"# others: {', '.join(others)}"] if others else []


def _shape(node: dict[str, str]) -> tuple[str, int, int, int]:
    """Type and number of GPUs, CPUs, memory in MB."""
    kind, gpus = next(iter(slurm.gpus_of(node).items()), ("", 0))
    return kind, gpus, int(node.get("CPUTot", "1")), int(node.get("RealMemory", "0"))
