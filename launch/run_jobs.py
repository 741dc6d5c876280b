"""The jobs of a run: which ids it has had, and what the scheduler says of them."""

import json
import os
import shlex
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.rundir import RunDirectory, RunState

_CONTROLLER = "submitit.core._submit"
# A run on another machine that was silent for so long is over: longer than any start, validation or save.
_SILENT_S = 1800.0


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Args:
        jobs: ids: Slurm's, or the process number of a local controller.
        scheduler: slurm or local.
        cluster: name or path of the cluster file.
        nodes: of a job that run ranks.
        ranks_per_node: as given, or None.
        time_limit: of a job.
        chain: jobs in a row, or None.
        host: machine it was submitted on; the one that a local controller runs on.
        spares: further nodes of a job.
    """

    jobs: tuple[str, ...]
    scheduler: str
    cluster: str
    nodes: int
    ranks_per_node: int | None = None
    time_limit: str | None = None
    chain: int | None = None
    host: str | None = None
    spares: int = 0

    @property
    def elsewhere(self) -> str | None:
        """The other machine on which a run without Slurm was started; None for this one, and for Slurm's."""
        return self.host if self.scheduler == "local" and self.host not in (None, os.uname().nodename) else None


def submissions(directory: RunDirectory) -> list[Submission]:
    """All submissions of a run, oldest first."""
    found = []
    for line in directory.jobs.read_text().splitlines() if directory.jobs.is_file() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
            found.append(
                Submission(
                    tuple(map(str, entry["jobs"])),
                    str(entry["scheduler"]),
                    str(entry["cluster"]),
                    int(entry["nodes"]),
                    entry.get("ranks_per_node"),
                    entry.get("time_limit"),
                    entry.get("chain"),
                    entry.get("host"),
                    int(entry.get("spares") or 0),
                )
            )
        except (ValueError, KeyError, TypeError):
            continue  # cut off in writing
    return found


def is_local_job(process: str, directory: RunDirectory) -> bool:
    """Whether a process is this run's job on this machine, and not another that got its number."""
    import psutil  # for jobs on this machine only; every `mq launch` imports this module

    try:
        found = psutil.Process(int(process))
        running = found.status() != psutil.STATUS_ZOMBIE
        return running and str(directory.submission) in " ".join(found.cmdline())
    except (psutil.Error, ValueError):
        return False


def active(directory: RunDirectory, queue: dict[str, slurm.QueuedJob]) -> list[str]:
    """Ids of the run's jobs that wait or run.

    Args:
        directory: the run.
        queue: Slurm's jobs.
    """
    newest = submissions(directory)[-1:]
    if not newest:
        return []
    if newest[0].elsewhere is not None:
        return list(newest[0].jobs) if _has_moved(directory) else []
    if newest[0].scheduler == "local":
        return [job for job in newest[0].jobs if is_local_job(job, directory)]
    # A job that is being cleaned up after the run's end is over; one that is requeued looks the same to Slurm.
    over = directory.state() in (RunState.DONE, RunState.STOPPED)
    return [
        job
        for job in newest[0].jobs
        if job in queue
        and queue[job].state not in slurm.ENDED
        and not (queue[job].state == "COMPLETING" and (over or directory.is_cancelled(job)))
    ]


def known(runs: Iterable[RunDirectory]) -> dict[str, slurm.QueuedJob]:
    """What Slurm knows of the newest jobs of runs, in one question; nothing is asked where none has any.

    Raises:
        SlurmError: Slurm does not answer.
    """
    newest = [found[-1] for run in runs if (found := submissions(run))]
    return slurm.jobs([job for one in newest if one.scheduler == "slurm" for job in one.jobs])


def ending(directory: RunDirectory, queue: dict[str, slurm.QueuedJob]) -> list[str]:
    """Ids of the run's jobs that have been ended and may still save."""
    newest = submissions(directory)[-1:]
    jobs = newest[0].jobs if newest and newest[0].scheduler == "slurm" else ()
    return [job for job in jobs if job in queue and queue[job].state == "COMPLETING"]


def require_none(directory: RunDirectory) -> None:
    """Raises ConfigError if a job of the run waits or runs: a second start would take the run from it."""
    newest = submissions(directory)[-1:]
    if not newest or os.environ.get("SLURM_JOB_ID") in newest[0].jobs:
        return
    where = str(directory.path)
    if newest[0].scheduler == "slurm" and not slurm.is_there():
        if _has_moved(directory):
            fix = (
                "is in use by a job of a cluster that this machine cannot ask, as its files of the last half hour "
                "tell; cancel the job there, or use another --run-dir."
            )
            raise ConfigError(Problem("--run-dir", where, fix))
        return
    try:
        queue = known([directory])
    except UserError as error:
        fix = f"has had job {', '.join(newest[0].jobs)}, and whether it still runs cannot be asked: {error.problems[0]}"
        raise ConfigError(Problem("--run-dir", where, fix)) from None
    if jobs := [*active(directory, queue), *ending(directory, queue)]:
        fix = (
            f"is in use by job {', '.join(dict.fromkeys(jobs))}. To see it: mq launch status {shlex.quote(where)}; to "
            f"end it: mq launch cancel {shlex.quote(where)}; or use another --run-dir."
        )
        raise ConfigError(Problem("--run-dir", where, fix))


def _has_moved(directory: RunDirectory) -> bool:
    """Whether a run has shown a sign of life lately: all that another machine can see of its processes."""
    if directory.state() not in (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED):
        return False
    signs = [path.stat().st_mtime for path in (directory.jobs, directory.heartbeat) if path.is_file()]
    return time.time() - max(signs, default=0.0) < _SILENT_S


def tell_local(process: str, number: signal.Signals) -> None:
    """Sends the controller of a job on this machine a signal; submitit's processes around it would not hand it on."""
    import psutil

    try:
        members = psutil.Process(int(process)).children(recursive=True)
        controllers = [member for member in members if _CONTROLLER in member.cmdline()]
    except (psutil.Error, ValueError):
        return  # it has just ended
    for controller in controllers:
        controller.send_signal(number)
