"""The jobs of a run: which ids it has had, and what the scheduler says of them."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen import slurm
from megatron_qwen.rundir import RunDirectory, RunState


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Args:
        jobs: ids: Slurm's, or the process number of a local controller.
        scheduler: slurm or local.
        cluster: name or path of the cluster file.
        nodes: of a job.
    """

    jobs: tuple[str, ...]
    scheduler: str
    cluster: str
    nodes: int


def submissions(directory: RunDirectory) -> list[Submission]:
    """All submissions of a run, oldest first."""
    found = []
    for line in directory.jobs.read_text().splitlines() if directory.jobs.is_file() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
            jobs = tuple(map(str, entry["jobs"]))
            found.append(Submission(jobs, str(entry["scheduler"]), str(entry["cluster"]), int(entry["nodes"])))
        except (ValueError, KeyError, TypeError):
            continue  # cut off in writing
    return found


def is_local_job(process: str, directory: RunDirectory) -> bool:
    """Whether a process is the controller of this run on this machine, and not another with the same number."""
    try:
        command = Path(f"/proc/{int(process)}/cmdline").read_bytes().decode(errors="replace")
        state = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False
    return str(directory.submission) in command and state != "Z"


def active(directory: RunDirectory, queue: dict[str, slurm.QueuedJob]) -> list[str]:
    """Ids of the run's jobs that wait or run.

    Args:
        directory: the run.
        queue: Slurm's jobs.
    """
    newest = submissions(directory)[-1:]
    if not newest:
        return []
    if newest[0].scheduler == "local":
        return [job for job in newest[0].jobs if is_local_job(job, directory)]
    # A job that is being cleaned up after the run's end is over; one that is requeued looks the same to Slurm.
    over = directory.state() in (RunState.DONE, RunState.STOPPED, RunState.CANCELLED)
    gone = slurm.ENDED | {"COMPLETING"} if over else slurm.ENDED
    return [job for job in newest[0].jobs if job in queue and queue[job].state not in gone]


def tell_local(process: str, number: signal.Signals) -> None:
    """Sends a local controller a signal, through submitit's process around it."""
    os.kill(int(process), number)
