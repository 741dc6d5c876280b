"""Whether a job that starts is the run's: one that no submission has noted, or an old one, may be one too many.

A submission that is killed at the wrong moment leaves a job that jobs.jsonl does not name. If the run has got another
job since, the two would take the run from each other. The later one to start leaves; a job that is alone joins.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from megatron_qwen.json_lines import objects
from megatron_qwen.rundir import RunDirectory

log = logging.getLogger(__name__)
# A job may start before its submission has noted it. Chosen by hand: that takes milliseconds, and a shared file system
# may show a line late.
_NOTE_WAIT_S, _POLL_S = 10.0, 0.5
_OF_SUBMISSION = ("name", "folder", "index", "begun", "pid")


def joins(
    directory: RunDirectory, job_id: str, *, others: Callable[[Sequence[str]], Sequence[str]] | None = None
) -> bool:
    """Whether the job is to make attempts at the run; one that is not noted and alone is noted here.

    Args:
        directory: of the run.
        job_id: of this job.
        others: those of given jobs that wait or run; None asks Slurm.

    Raises:
        SlurmError: Slurm does not answer, so nobody knows.
    """
    submissions = _submissions(directory)
    if not submissions and not directory.submitting.is_file():
        return True  # started in another way, which notes nothing
    deadline = time.monotonic() + (_NOTE_WAIT_S if directory.submitting.is_file() else 0.0)
    while not _is_newest(job_id, submissions) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        submissions = _submissions(directory)
    if _is_newest(job_id, submissions):
        return True
    newest = [str(job) for job in submissions[-1]["jobs"]] if submissions else []
    if there := (others or _alive)(newest):
        log.warning("the run has got job %s since: this job is one too many, and changes nothing", ", ".join(there))
        return False
    pattern = _announced(directory) or next(reversed(submissions), None)
    if pattern is None:
        return True  # its submission has ended, and what it noted is not to be seen yet: no other job is either
    entry = {name: value for name, value in pattern.items() if name not in _OF_SUBMISSION}
    with directory.jobs.open("a") as file:
        file.write(json.dumps({**entry, "jobs": [job_id], "adopted": True}) + "\n")
    log.warning("no submission has noted this job, and the run has no other: it is the run's now")
    return True


def _is_newest(job_id: str, submissions: Sequence[dict[str, Any]]) -> bool:
    return bool(submissions) and job_id in map(str, submissions[-1]["jobs"])


def _submissions(directory: RunDirectory) -> list[dict[str, Any]]:
    lines = directory.jobs.read_bytes().splitlines() if directory.jobs.is_file() else []
    return [entry for entry in objects(lines) if isinstance(entry.get("jobs"), list)]


def _announced(directory: RunDirectory) -> dict[str, Any] | None:
    try:
        content = json.loads(directory.submitting.read_text())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def _alive(jobs: Sequence[str]) -> list[str]:
    try:
        known = slurm.jobs(jobs)
    except UserError:
        time.sleep(_NOTE_WAIT_S)  # a restart of slurmctld
        known = slurm.jobs(jobs)
    return [job for job in jobs if job in known and known[job].state not in slurm.ENDED]
