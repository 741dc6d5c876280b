"""The nodes of a job: starting ranks on them, what the scheduler does with the job, and how it is requeued."""

import datetime
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from megatron_qwen.job.local_ranks import LOCAL_NODE, LocalRanks
from megatron_qwen.job.ranks import Ranks, SrunRanks, environment_of_ranks, placement
from megatron_qwen.job.settings import JobSettings

_RANK = ("-P", "-m", "megatron_qwen.train")
# The range ends below 32,768, where Linux begins to give out ports of outgoing connections.
_FIRST_PORT, _PORTS = 15_000, 17_000
# Waits between tries of scontrol. An answer only adds a reason or an excluded node, so 17 s are enough. A requeue that
# never reaches slurmctld ends the run, so its 257 s outlast a restart and a fail-over, which Slurm begins after 120 s
# by default (SlurmctldTimeout). Chosen by hand.
_SHOW_WAITS_S = (2.0, 5.0, 10.0)
_REQUEUE_WAITS_S = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0)


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
        """Names of the nodes."""

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

    def ending(self) -> Ending:
        """What the scheduler is doing with the job."""

    def seconds_left(self) -> float | None:
        """Time until the job's time limit; None where there is none."""

    def lost_among(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Those of the nodes that the scheduler reports down."""

    def requeue(self, exclude: Sequence[str]) -> None:
        """Requeues the job and has the scheduler avoid the excluded nodes."""


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

    def ending(self) -> Ending:
        """No scheduler, so nothing ends the job."""
        return Ending.NOTHING

    def seconds_left(self) -> float | None:
        """No limit."""
        return None

    def lost_among(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """This machine is up."""
        return ()

    def requeue(self, exclude: Sequence[str]) -> None:
        """Nothing to do: the controller starts the next attempt itself."""


class SlurmAllocation:
    """The nodes of a Slurm job, seen from its batch script on the first of them.

    Args:
        settings: of the job.
        environ: Slurm's variables.
    """

    requeues_in_place = False

    def __init__(self, settings: JobSettings, environ: Mapping[str, str] = os.environ) -> None:
        self.settings, self._environ = settings, environ
        # One task of every array has the array's own job id. A command that names only that id acts on the whole array,
        # so a task is named ARRAY_TASK.
        array = environ.get("SLURM_ARRAY_JOB_ID")
        self.job_id = f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]
        self.restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = tuple(slurm.hostnames(environ["SLURM_JOB_NODELIST"]))
        self.tasks = slurm.tasks_per_node(environ["SLURM_TASKS_PER_NODE"])
        self.world_size = sum(self.tasks)

    def environment(self, attempt: int) -> dict[str, str]:
        """The job's environment, with the rendezvous address and port of the ranks."""
        return environment_of_ranks(
            self._environ, address=self.master_address(), port=self.master_port(), attempt=attempt
        )

    def start(self, run_dir: Path, *, attempt: int, logs: Path) -> Ranks:
        """Starts the ranks under srun, one task per rank."""
        command = [*self.settings.rank_prefix, self.settings.python, *_RANK, str(run_dir)]
        return SrunRanks(
            command,
            srun_arguments=[
                f"--nodes={len(self.nodes)}",
                f"--ntasks={self.world_size}",
                "--distribution=block",
                *self.settings.srun_arguments,
            ],
            logs=logs,
            environment=self.environment(attempt),
            job_id=self.job_id,
            placement=placement(self.nodes, self.tasks),
        )

    def master_address(self) -> str:
        """Address of the first node, where this controller and rank 0 run.

        Slurm's NodeAddr is asked first, because a node name need not resolve on the other nodes.
        """
        try:
            shown = slurm.show_nodes(self.nodes[:1])
            address = shown[self.nodes[0]].get("NodeAddr", "")
        except (UserError, KeyError):
            address = ""
        return address or self._environ.get("SLURM_LAUNCH_NODE_IPADDR") or self.nodes[0]

    def master_port(self) -> int:
        """A free port for the rendezvous, derived from job id and restart count.

        Two jobs that share a node get different ports, and so does a restart: sockets of the previous attempt may
        still be in TIME_WAIT. The stride of 7 leaves room for the restarts of a job before the next job's port.
        """
        wanted = int(self._environ["SLURM_JOB_ID"]) * 7 + self.restarts
        for offset in range(_PORTS):
            port = _FIRST_PORT + (wanted + offset) % _PORTS
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return port
        return _FIRST_PORT + wanted % _PORTS

    def _shown(self) -> dict[str, str]:
        """The job as ``scontrol show job`` prints it; empty if Slurm does not answer after several tries."""
        try:
            return _patiently(lambda: slurm.show_job(self.job_id), _SHOW_WAITS_S)
        except UserError as error:
            print(error.render(), file=sys.stderr)
            return {}

    def ending(self) -> Ending:
        """What Slurm is doing with the job.

        While Slurm ends a job its JobState reads COMPLETING whatever the cause, so the cause is derived from the other
        fields, the most specific first:

        - Restarts grew, or the job is pending again: requeued (by hand, or after a node failure).
        - PreemptTime is set: preempted.
        - The time since StartTime has reached TimeLimit: timed out.
        - Otherwise somebody cancelled it.
        """
        shown = self._shown()
        state = shown.get("JobState", "RUNNING")
        if int(shown.get("Restarts", "0")) > self.restarts or state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            return Ending.REQUEUED
        if shown.get("PreemptTime", "None") != "None":
            return Ending.PREEMPTING
        if state in ("RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING"):
            return Ending.NOTHING
        if state == "CANCELLED":
            return Ending.CANCELLED
        left = _seconds_until(shown.get("EndTime", ""))
        limit = slurm.minutes(shown.get("TimeLimit", ""))
        begun = _seconds_until(shown.get("StartTime", ""))
        overdue = limit is not None and begun is not None and -begun >= limit * 60
        return Ending.TIMED_OUT if state == "TIMEOUT" or (left is not None and overdue) else Ending.CANCELLED

    def seconds_left(self) -> float | None:
        """Time until the job's time limit."""
        return _seconds_until(self._shown().get("EndTime", ""))

    def lost_among(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Nodes that are down or do not answer. A drained node is neither: its jobs keep running."""
        try:
            shown = slurm.show_nodes(nodes)
        except UserError as error:
            print(error.render(), file=sys.stderr)
            return ()
        return tuple(name for name, node in shown.items() if slurm.is_lost(node))

    def requeue(self, exclude: Sequence[str]) -> None:
        """Requeues the job, unless Slurm has done so already, and has it avoid the excluded nodes.

        Raises:
            SlurmError: Slurm refused.
        """
        # After the requeue Slurm sends SIGTERM to every process of this job, the scontrol commands below included:
        # children inherit the blocked signal, so ExcNodeList is still set.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if self.ending() is not Ending.REQUEUED:
                _patiently(lambda: slurm.ask("scontrol", "requeue", self.job_id), _REQUEUE_WAITS_S)
            if avoided := self._avoidable(exclude):
                command = ("scontrol", "update", f"JobId={self.job_id}", f"ExcNodeList={','.join(avoided)}")
                _patiently(lambda: slurm.ask(*command), _SHOW_WAITS_S)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _avoidable(self, exclude: Sequence[str]) -> list[str]:
        """Nodes to exclude, together with those excluded already; empty if too few nodes would remain for the job."""
        if not exclude:
            return []
        shown = self._shown()
        already = slurm.hostnames(shown.get("ExcNodeList", "").replace("(null)", ""))
        avoided = sorted({*exclude, *already})
        partitions = set(shown.get("Partition", "").split(","))
        members = [
            name for name, node in slurm.show_nodes().items() if partitions & set(node.get("Partitions", "").split(","))
        ]
        left = len(set(members) - set(avoided))
        if left < len(self.nodes):
            print(
                f"{', '.join(exclude)} cannot be excluded: the job needs {len(self.nodes)} nodes and its partition has "
                f"{left} others",
                file=sys.stderr,
            )
            return []
        return avoided


def _patiently[Answer](action: Callable[[], Answer], waits_s: Sequence[float]) -> Answer:
    """What Slurm answers, with a retry after each wait: a restart of slurmctld must not end a run."""
    for wait_s in waits_s:
        try:
            return action()
        except UserError as error:
            if "Invalid job id" in str(error):
                raise  # Slurm does answer: the job does not exist any more
            print(f"{error.render()} (retrying in {wait_s:.0f} s)", file=sys.stderr)
            time.sleep(wait_s)
    return action()


def _seconds_until(moment: str) -> float | None:
    """Seconds from now to a time as Slurm prints it, in local time; None for ``Unknown``."""
    try:
        return (datetime.datetime.fromisoformat(moment) - datetime.datetime.now()).total_seconds()
    except ValueError:
        return None


def find(settings: JobSettings, *, world_size: int) -> JobAllocation:
    """The allocation this process was given.

    Args:
        settings: of the job.
        world_size: ranks of a local run; a Slurm job's are as many as its tasks.
    """
    if settings.scheduler == "slurm":
        return SlurmAllocation(settings)
    return LocalAllocation(settings, world_size)
