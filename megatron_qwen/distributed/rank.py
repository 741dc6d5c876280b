"""Rank of this process, and how it joins torch.distributed."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from megatron_qwen import device, slurm
from megatron_qwen.errors import ConfigError, Problem


@dataclass(frozen=True)
class RankInfo:
    """Place of a process: its rank of ``world_size``, and its rank on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "RankInfo":
        """Reads torchrun's variables, else those of srun, else a single rank.

        Raises:
            ConfigError: only some variables of a launcher are set.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
            if missing:
                raise ConfigError(
                    [
                        Problem(
                            name, None, "must be set with RANK and WORLD_SIZE; start with torchrun, srun or mq train."
                        )
                        for name in missing
                    ]
                )
            return cls(
                int(environ["RANK"]),
                int(environ["WORLD_SIZE"]),
                int(environ.get("LOCAL_RANK", "0")),
                int(environ.get("LOCAL_WORLD_SIZE", "1")),
                environ["MASTER_ADDR"],
                int(environ["MASTER_PORT"]),
            )
        if under_srun(environ):
            return cls(
                int(environ["SLURM_PROCID"]),
                int(environ["SLURM_NTASKS"]),
                int(environ["SLURM_LOCALID"]),
                _tasks_here(environ),
                environ.get("MASTER_ADDR") or _first_node_address(environ["SLURM_JOB_NODELIST"]),
                int(environ.get("MASTER_PORT") or _port_of_job(environ)),
            )
        return cls(0, 1, 0, 1, "127.0.0.1", 0)


def under_srun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one task of a job step (and not the batch script or a plain shell)."""
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node."""
    counts = slurm.tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return counts[int(environ.get("SLURM_NODEID", "0"))]


def _port_of_job(environ: Mapping[str, str]) -> int:
    """A port that differs between jobs of a node and between restarts of one job.

    The stride of 7 leaves room for restarts before the next job's port. The range ends below 32,768, where Linux begins
    to give out ports of outgoing connections.
    """
    return 15_000 + (int(environ["SLURM_JOB_ID"]) * 7 + int(environ.get("SLURM_RESTART_COUNT", "0"))) % 17_000


def _first_node_address(node_list: str) -> str:
    """NodeAddr of a job's first node; node names need not resolve."""
    first = slurm.hostnames(node_list)[0]
    try:
        return slurm.show_nodes([first])[first].get("NodeAddr", first)
    except (slurm.SlurmError, KeyError):
        return first


def join(info: RankInfo, *, timeout_minutes: int) -> None:
    """Starts torch.distributed and picks this rank's device.

    Args:
        info: rank, world size and rendezvous address of this process.
        timeout_minutes: timeout of a collective.
    """
    device.select(info.local_rank, local_world_size=info.local_world_size)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if info.world_size == 1 and info.master_port == 0:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(device.backend(), store=store, rank=0, world_size=1, timeout=timeout)
        return
    dist.init_process_group(
        device.backend(),
        init_method=f"tcp://{info.master_address}:{info.master_port}",
        rank=info.rank,
        world_size=info.world_size,
        timeout=timeout,
    )


def leave() -> None:
    """Ends torch.distributed if it runs."""
    if dist.is_initialized():
        dist.destroy_process_group()
