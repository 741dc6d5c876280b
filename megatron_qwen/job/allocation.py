"""The nodes of a job: starting ranks on them, what the scheduler does with the job, and how it is requeued."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from megatron_qwen.job.avoiding import Avoided
from megatron_qwen.job.local_ranks import LOCAL_NODE, LocalRanks
from megatron_qwen.job.ranks import Ranks
from megatron_qwen.job.settings import JobSettings


class Ending(Enum):
    """What the scheduler is doing with the job."""

    NOTHING = "the job keeps running"
    PREEMPTING = "another job preempts it"
    REQUEUED = "it is back in the queue"
    TIMED_OUT = "it reached its time limit"
    CANCELLED = "it was cancelled"


class JobAllocation(Protocol):
    """Where a controller runs."""

    @property
    def job_id(self) -> str | None:
        """Slurm's number of the job, None without Slurm."""

    @property
    def restarts(self) -> int:
        """How often the scheduler has started the job before."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that run the ranks."""

    @property
    def spare_nodes(self) -> tuple[str, ...]:
        """Nodes of the job that could replace one of these."""

    @property
    def world_size(self) -> int:
        """Ranks that run there."""

    @property
    def requeues_in_place(self) -> bool:
        """Whether the next attempt is made by this process."""

    def environment(self, attempt: int) -> dict[str, str]:
        """Variables of what is started on the nodes."""

    def start(self, run_dir: Path, *, attempt: int, logs: Path) -> Ranks:
        """Starts the ranks of an attempt."""

    def prepare(self, run_dir: Path, *, attempt: int, folder: Path) -> None:
        """Starts processes on the nodes that ``start`` makes the ranks of a later attempt, if it is on these nodes.

        Args:
            run_dir: the run.
            attempt: that they are for.
            folder: for their output while they wait.
        """

    def close(self) -> None:
        """Ends what was prepared and not used."""

    def step_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Arguments that start something on some nodes of the job."""

    def regroup(self, avoid: Sequence[str]) -> str | None:
        """Chooses nodes of the job for the next attempt, and makes sure that no rank of the last one is left on them.

        Args:
            avoid: nodes that must not be used.

        Returns:
            None, or why the job cannot run another attempt where it is; ``nodes`` is as before then.
        """

    def set_aside(self, nodes: Sequence[str]) -> None:
        """Never uses these spare nodes in this job."""

    def ending(self) -> Ending:
        """What the scheduler is doing with the job."""

    def seconds_left(self) -> float | None:
        """Time until the job's time limit; None where there is none."""

    def lost_among(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Those of the nodes that the scheduler reports down."""

    def requeue(self, *, delay_s: float = 0.0) -> None:
        """Requeues the job, and has the scheduler start it no sooner than after a delay."""

    def avoid(self, wanted: Sequence[str], *, asked_before: Collection[str], job_id: str) -> Avoided:
        """Has the scheduler keep a job that waits from nodes.

        Args:
            wanted: the nodes, the best proven first; none lifts what was asked before.
            asked_before: nodes that earlier calls asked for; what else is excluded stays so.
            job_id: this job, requeued, or a later one of its chain.

        Returns:
            What is in force.
        """

    def keep(self, word: str) -> None:
        """Keeps a word with the job, for its next start, where no file can be written."""

    def kept(self, job_id: str | None) -> str:
        """The word that was kept with a job, this one or another; empty if there is none."""


@dataclass(frozen=True)
class LocalAllocation:
    """This machine, without Slurm.

    Args:
        settings: of the job.
        world_size: ranks to start.
    """

    settings: JobSettings
    world_size: int
    job_id: str | None = None
    restarts: int = 0
    nodes: tuple[str, ...] = (LOCAL_NODE,)
    spare_nodes: tuple[str, ...] = ()
    requeues_in_place: bool = True

    def environment(self, attempt: int) -> dict[str, str]:
        """This process's, and the attempt."""
        return {**os.environ, "MQ_ATTEMPT": str(attempt)}

    def start(self, run_dir: Path, *, attempt: int, logs: Path) -> Ranks:
        """Starts the ranks as children."""
        ranks = LocalRanks(
            run_dir,
            world_size=self.world_size,
            log_dir=logs,
            python=self.settings.python,
            environment=self.environment(attempt),
            quiet=True,
        )
        ranks.start()
        return ranks

    def prepare(self, run_dir: Path, *, attempt: int, folder: Path) -> None:
        """Nothing: one machine starts its ranks soon enough."""

    def close(self) -> None:
        """Nothing was prepared."""

    def step_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """None."""
        return ()

    def regroup(self, avoid: Sequence[str]) -> str | None:
        """There is only this machine."""
        return None

    def set_aside(self, nodes: Sequence[str]) -> None:
        """There is none."""

    def ending(self) -> Ending:
        """No scheduler, so nothing ends the job."""
        return Ending.NOTHING

    def seconds_left(self) -> float | None:
        """No limit."""
        return None

    def lost_among(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """This machine is up."""
        return ()

    def requeue(self, *, delay_s: float = 0.0) -> None:
        """Nothing to do: the controller starts the next attempt itself."""

    def avoid(self, wanted: Sequence[str], *, asked_before: Collection[str], job_id: str) -> Avoided:
        """There is one node."""
        return Avoided()

    def keep(self, word: str) -> None:
        """Nothing to do: the controller remembers it."""

    def kept(self, job_id: str | None) -> str:
        """Nothing."""
        return ""
