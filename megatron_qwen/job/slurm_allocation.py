"""The nodes of a Slurm job, seen from its batch script."""

import datetime
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.avoiding import Avoided, avoidable, places_of
from megatron_qwen.job.node_choice import choose
from megatron_qwen.job.ranks import HEALTH_STEP, RANKS_STEP, Ranks, SrunRanks, environment_of_ranks, placement
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.standby import STANDBY_STEP, Standby
from megatron_qwen.resilience.standby import lay_out

log = logging.getLogger(__name__)
_RANK = ("-P", "-m", "megatron_qwen.train")
# The range ends below 32,768, where Linux begins to give out ports of outgoing connections.
_FIRST_PORT, _PORTS = 15_000, 17_000
# Waits between tries of scontrol. An answer only adds a reason or an excluded node, so 17 s are enough. A requeue that
# never reaches slurmctld ends the run, so its 257 s outlast a restart and a fail-over, which Slurm begins after 120 s
# by default (SlurmctldTimeout). Chosen by hand.
_SHOW_WAITS_S = (2.0, 5.0, 10.0)
_STEPS_POLL_S, _STEPS_END_S = 0.5, 60.0  # for killed ranks to be reaped, also by a node that is slow; chosen by hand
_REQUEUE_WAITS_S = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0)


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
        nodes = slurm.hostnames(environ["SLURM_JOB_NODELIST"])
        self._tasks = dict(zip(nodes, slurm.tasks_per_node(environ["SLURM_TASKS_PER_NODE"]), strict=True))
        used = max(1, len(nodes) - settings.spares)
        self.nodes, self.spare_nodes = tuple(nodes[:used]), tuple(nodes[used:])
        self.tasks = [self._tasks[node] for node in self.nodes]
        self.world_size = sum(self.tasks)
        self._aside: set[str] = set()
        self._standby: Standby | None = None
        self._steps = {RANKS_STEP, HEALTH_STEP}

    def environment(self, attempt: int) -> dict[str, str]:
        """The job's environment, with the rendezvous address and port of the ranks."""
        return environment_of_ranks(
            self._environ, address=self.master_address(), port=self.master_port(attempt), attempt=attempt
        )

    def start(self, run_dir: Path, *, attempt: int, logs: Path) -> Ranks:
        """Starts the ranks under srun, one task per rank, or has those that wait begin."""
        environment = self.environment(attempt)
        standby = self._standby
        ranks = None if standby is None else standby.begin(self.nodes, environment, logs)
        self._standby = None  # not before: ``close`` ends it where ``begin`` fails
        if standby is not None and ranks is not None:
            self._steps.add(standby.name)
            return ranks
        return self._srun(run_dir, environment=environment, logs=logs)

    def prepare(self, run_dir: Path, *, attempt: int, folder: Path) -> None:
        """Starts ranks beside those that run, which wait."""
        self.close()
        lay_out(folder)
        environment, name = self.environment(attempt), f"{STANDBY_STEP}_{attempt}"
        ranks = self._srun(run_dir, "--standby", str(folder), environment=environment, logs=folder, name=name)
        self._standby = Standby(ranks, name, self.nodes, environment, folder)

    def close(self) -> None:
        """Ends ranks that wait."""
        if self._standby is not None:
            self._standby.end()
        self._standby = None

    def _srun(
        self, run_dir: Path, *options: str, environment: Mapping[str, str], logs: Path, name: str = RANKS_STEP
    ) -> SrunRanks:
        return SrunRanks(
            [*self.settings.rank_prefix, self.settings.python, *_RANK, str(run_dir), *options],
            srun_arguments=[
                f"--nodes={len(self.nodes)}",
                f"--ntasks={self.world_size}",
                "--distribution=block",
                *(["--overlap"] if name != RANKS_STEP else []),
                *self.step_nodes(self.nodes),
                *self.settings.srun_arguments,
            ],
            logs=logs,
            environment=environment,
            job_id=self.job_id,
            placement=placement(self.nodes, self.tasks),
            name=name,
        )

    def step_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Arguments of srun for a step on some nodes of the job; none if these are all that it was given."""
        return () if tuple(nodes) == tuple(self._tasks) else (f"--nodelist={','.join(nodes)}",)

    def regroup(self, avoid: Sequence[str]) -> str | None:
        """Chooses the first nodes of the job that are up, not drained and not to be avoided.

        Slurm takes a node that failed out of the job if the job was submitted with ``--no-kill``, which a job with
        spare nodes is.
        """
        try:
            shown = _patiently(lambda: slurm.show_job(self.job_id), _REQUEUE_WAITS_S)
            if (ending := self._ending_of(shown)) is not Ending.NOTHING:
                return str(ending.value)
            if shown.get("JobState") in ("FAILED", "COMPLETING"):
                return "the job is ending"
            states = slurm.show_nodes(tuple(self._tasks))
            if left := self._steps_left():
                return f"step {', '.join(left)} of the job has not ended"
        except UserError as error:
            return error.render()
        held = slurm.hostnames(shown.get("NodeList", ""))
        unfit = {name for name in self._tasks if name not in held or _is_leaving(states.get(name, {}))}
        choice = choose(self._tasks, self.tasks, unfit | self._aside | set(avoid))
        if choice is None:
            return f"{len(self.tasks)} healthy nodes are needed and the job has fewer"
        self.nodes, self.spare_nodes = choice.used, choice.spare
        return None

    def set_aside(self, nodes: Sequence[str]) -> None:
        """Never uses these nodes in this job."""
        self._aside |= set(nodes)
        self.spare_nodes = tuple(node for node in self.spare_nodes if node not in self._aside)

    def _steps_left(self) -> list[str]:
        """Steps of the last attempt that cannot be ended; one whose srun was killed lives on."""
        deadline = time.monotonic() + _STEPS_END_S
        while (left := slurm.steps(self.job_id, tuple(self._steps))) and time.monotonic() < deadline:
            for step in left:
                with suppress(UserError):  # it may have ended since
                    slurm.ask("scancel", "--signal=KILL", step)
            time.sleep(_STEPS_POLL_S)
        return left

    def master_address(self) -> str:
        """Address of the first node that is used, where rank 0 runs.

        Slurm's NodeAddr is asked first, because a node name need not resolve on the other nodes.
        """
        try:
            shown = slurm.show_nodes(self.nodes[:1])
            address = shown[self.nodes[0]].get("NodeAddr", "")
        except (UserError, KeyError):
            address = ""
        here = self._environ.get("SLURM_LAUNCH_NODE_IPADDR") if self._is_here(self.nodes[0]) else None
        return address or here or self.nodes[0]

    def _is_here(self, node: str) -> bool:
        """Whether this process runs on a node: the batch script is on the first of the job."""
        return node == next(iter(self._tasks))

    def master_port(self, attempt: int) -> int:
        """A port for the rendezvous, derived from job id and attempt; free where this process can tell.

        Two jobs that share a node get different ports, and so does the next attempt: sockets of the previous one may
        still be in TIME_WAIT. The stride of 7 leaves room for the attempts of a job before the next job's port.
        """
        wanted = int(self._environ["SLURM_JOB_ID"]) * 7 + attempt
        for offset in range(_PORTS if self._is_here(self.nodes[0]) else 0):
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
            log.error("%s", error.render())
            return {}

    def ending(self) -> Ending:
        """What Slurm is doing with the job.

        While Slurm ends a job its JobState reads COMPLETING whatever the cause, so the cause is derived from the other
        fields, the most specific first:

        - Restarts grew, or the job is pending again: requeued (by hand, or after a node failure).
        - PreemptTime is set: preempted.
        - Reason is NonZeroExitCode: the batch script has died under this process.
        - The time since StartTime has reached TimeLimit: timed out.
        - Otherwise somebody cancelled it.
        """
        return self._ending_of(self._shown())

    def _ending_of(self, shown: Mapping[str, str]) -> Ending:
        state = shown.get("JobState", "RUNNING")
        if self._is_back(shown):
            return Ending.REQUEUED
        if shown.get("PreemptTime", "None") != "None":
            return Ending.PREEMPTING
        if state in ("RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING"):
            return Ending.NOTHING
        if state == "CANCELLED":
            return Ending.CANCELLED
        if state == "FAILED" or shown.get("Reason") == "NonZeroExitCode":
            return Ending.NOTHING  # nobody has ended it: its batch script was killed, and this process lives on
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
            log.error("%s", error.render())
            return ()
        return tuple(name for name, node in shown.items() if slurm.is_lost(node))

    def keep(self, word: str) -> None:
        """Makes the word the job's comment, which Slurm keeps over a requeue."""
        try:
            _patiently(
                lambda: slurm.ask("scontrol", "update", f"JobId={self.job_id}", f"Comment={word}"), _SHOW_WAITS_S
            )
        except UserError as error:
            log.error("%s", error.render())

    def kept(self, job_id: str | None) -> str:
        """The comment of a job; Slurm forgets jobs some minutes after their end."""
        try:
            return slurm.show_job(job_id).get("Comment", "") if job_id is not None else ""
        except UserError:
            return ""

    def requeue(self, *, delay_s: float = 0.0) -> None:
        """Requeues the job, unless Slurm has done so already, and sets the earliest moment of its next start.

        Raises:
            SlurmError: Slurm refused.
        """
        with _undisturbed():
            _patiently(self._requeue_once, _REQUEUE_WAITS_S)
            try:
                if delay_s and self._shown().get("JobState") != "RUNNING":
                    _update(self.job_id, f"StartTime=now+{delay_s:.0f}")
            except UserError as error:  # it is requeued all the same
                log.error("%s", error.render())

    def avoid(self, wanted: Sequence[str], *, asked_before: Collection[str], job_id: str) -> Avoided:
        """Sets ExcNodeList of a job that waits, to as many of the nodes as leave enough others, and reads it back.

        Raises:
            SlurmError: Slurm refused, or does not answer.
        """
        with _undisturbed():
            shown = _patiently(lambda: slurm.show_job(job_id), _SHOW_WAITS_S)
            already = _excluded(shown)
            if job_id == self.job_id and shown.get("JobState") in ("RUNNING", "CONFIGURING"):
                return Avoided(already, tuple(sorted({*wanted} - {*already})), "the job has started again already")
            fixed = [node for node in already if node not in asked_before]
            if not wanted and len(fixed) == len(already):
                return Avoided(already)
            places = places_of(
                shown.get("Partition", "").split(","),
                gpus=self._gpus_of_a_node(),
                reservation=shown.get("Reservation"),
                feature=shown.get("Features"),
            )
            # While Slurm ends a job, NumNodes counts the nodes that are left of it. All jobs of a run are of one size.
            needed = max(int(shown.get("NumNodes", "").partition("-")[0] or 0), len(self._tasks))
            chosen = avoidable(wanted, fixed=fixed, places=places, needed=needed)
            if {*fixed, *chosen.nodes} != {*already}:
                _update(job_id, f"ExcNodeList={','.join(sorted({*fixed, *chosen.nodes}))}")
            now = _excluded(_patiently(lambda: slurm.show_job(job_id), _SHOW_WAITS_S))
        others = tuple(sorted({*chosen.others, *chosen.nodes} - {*now}))
        return Avoided(now, others, chosen.why_not or ("Slurm did not take the change" if others else ""))

    def _gpus_of_a_node(self) -> int:
        """GPUs that every node of the job has: others cannot be relied on to fit it."""
        shown = slurm.show_nodes(self.nodes)
        return min((sum(slurm.gpus_of(node).values()) for node in shown.values()), default=0)

    def _requeue_once(self) -> None:
        """Slurm is asked each time: it may have taken a request whose answer was lost, and have started the job."""
        if not self._is_back(slurm.show_job(self.job_id)):
            slurm.ask("scontrol", "requeue", self.job_id)

    def _is_back(self, shown: Mapping[str, str]) -> bool:
        """Whether the job has been requeued since it started."""
        more = int(shown.get("Restarts", "0")) > self.restarts
        return more or shown.get("JobState") in ("PENDING", "REQUEUED", "REQUEUE_HOLD")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Blocks SIGTERM, which Slurm sends to every process of a job that is requeued, the scontrol commands included.

    Children inherit the mask, so a command that has begun ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _update(job_id: str, change: str) -> None:
    _patiently(lambda: slurm.ask("scontrol", "update", f"JobId={job_id}", change), _SHOW_WAITS_S)


def _excluded(shown: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(slurm.hostnames(shown.get("ExcNodeList", "").replace("(null)", "")))


def _patiently[Answer](action: Callable[[], Answer], waits_s: Sequence[float]) -> Answer:
    """What Slurm answers, with a retry after each wait: a restart of slurmctld must not end a run."""
    for wait_s in waits_s:
        try:
            return action()
        except UserError as error:
            if "Invalid job id" in str(error):
                raise  # Slurm does answer: the job does not exist any more
            log.warning("%s (retrying in %.0f s)", error.render(), wait_s)
            time.sleep(wait_s)
    return action()


def _is_leaving(node: Mapping[str, str]) -> bool:
    """Whether a node is lost, or an administrator wants it back: a start there would soon be ended, or fail again."""
    return slurm.is_lost(dict(node)) or "DRAIN" in node.get("State", "")


def _seconds_until(moment: str) -> float | None:
    """Seconds from now to a time as Slurm prints it, in local time; None for ``Unknown``."""
    try:
        return (datetime.datetime.fromisoformat(moment) - datetime.datetime.now()).total_seconds()
    except ValueError:
        return None
