"""Placement of ranks on nodes, for the log."""

import os

import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.distributed.rank import RankInfo


def placement_report(info: RankInfo) -> str:
    """A line a node, on rank 0; empty on the others. Called by all ranks together.

    Shows Slurm's node name and, where it differs, the host name.
    """
    host = os.uname().nodename
    name = os.environ.get("SLURMD_NODENAME", host)
    here = (name, host, info.local_rank, device.device_name(), os.getpid())
    everyone: list[tuple[str, str, int, str, int]] = [here] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    if dist.get_rank() != 0:
        return ""
    nodes: dict[tuple[str, str], list[str]] = {}
    for rank, (node, machine, local_rank, device_name, pid) in enumerate(everyone):
        nodes.setdefault((node, machine), []).append(f"{rank} (local {local_rank}, {device_name}, pid {pid})")
    lines = [f"{len(everyone)} ranks meet at {info.master_address}:{info.master_port}"]
    for (node, machine), ranks in nodes.items():
        where = node if node == machine else f"{node} ({machine})"
        lines.append(f"  {where}: ranks {', '.join(ranks)}")
    return "\n".join(lines)
