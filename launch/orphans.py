"""Jobs whose submission was killed, or got no answer, before it could note them: found by their name, and noted.

A submission writes what it is about to do (submitting.json), has Slurm take the job, notes the job in jobs.jsonl and
removes submitting.json. Whoever finds submitting.json of a process that is gone looks for the job. One that Slurm takes
later still, from a program that outlived its submission, sees to itself (``job.membership``).
"""

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import run_jobs
from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from megatron_qwen.files import atomic_write_json
from megatron_qwen.rundir import RunDirectory

# Of a submission on another machine only its age tells: it makes one call of sbatch a job, and each may take the minute
# after which a program of Slurm gives up. Chosen by hand.
_LONGEST_S = 600.0
_OF_SUBMISSION = ("name", "folder", "index", "begun", "pid")


def announce(directory: RunDirectory, entry: Mapping[str, Any], *, name: str, folder: Path, index: int | None) -> None:
    """Writes submitting.json.

    Args:
        directory: of the run.
        entry: the line of jobs.jsonl that is to come, without jobs.
        name: of the job.
        folder: where the job's script is; no other run's job comes from there.
        index: the run's task in an array, None of a job of its own.
    """
    own = {"name": name, "folder": str(folder), "index": index, "pid": os.getpid(), "begun": _begun(os.getpid())}
    atomic_write_json(directory.submitting, {**entry, **own})


def withdraw(directory: RunDirectory) -> None:
    """Removes submitting.json: its jobs are noted, or were refused."""
    directory.submitting.unlink(missing_ok=True)


def is_being_submitted(directory: RunDirectory) -> bool:
    """Whether another process is submitting the run at this moment."""
    entry = _announced(directory)
    return entry is not None and _lives(entry)


def is_cut_off(directory: RunDirectory) -> bool:
    """Whether a submission of the run was killed, and whether it has left a job is not known yet."""
    entry = _announced(directory)
    return entry is not None and not _lives(entry)


def settle(directory: RunDirectory, *, keep: bool = False) -> list[str]:
    """Notes the jobs of a submission that was killed.

    Args:
        directory: of the run.
        keep: whether submitting.json stays where no job is found, for a later look.

    Returns:
        Their ids.

    Raises:
        SlurmError: Slurm does not answer.
    """
    entry = _announced(directory)
    if entry is None or _lives(entry):
        return []
    found = _jobs_of(directory, entry)
    if found:
        noted = {name: value for name, value in entry.items() if name not in _OF_SUBMISSION}
        with directory.jobs.open("a") as file:
            file.write(json.dumps({**noted, "jobs": found, "adopted": True}) + "\n")
    if found or not keep:
        withdraw(directory)
    return found


def settle_where_possible(directory: RunDirectory) -> None:
    """The same for a look, which may not be allowed to write and continues without an answer of Slurm."""
    with contextlib.suppress(OSError, UserError):
        settle(directory, keep=True)


def _announced(directory: RunDirectory) -> dict[str, Any] | None:
    try:
        content = json.loads(directory.submitting.read_text())
        return content if isinstance(content, dict) and "folder" in content else None
    except (OSError, ValueError):
        return None


def _lives(entry: Mapping[str, Any]) -> bool:
    if entry.get("pid") == os.getpid() and entry.get("host") == os.uname().nodename:
        return False  # this process itself, which has continued after an error
    if entry.get("host") == os.uname().nodename:
        return _begun(int(entry["pid"])) == entry.get("begun")
    try:
        age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(str(entry["time"]))
    except (ValueError, KeyError, TypeError):
        return False
    return age.total_seconds() < _LONGEST_S


def _begun(process: int) -> float | None:
    """When a process began; its number alone may be another's by now. None where it is gone."""
    import psutil  # for the moments of a submission only; every `mq launch` imports this module

    try:
        return psutil.Process(process).create_time()
    except psutil.Error:
        return None


def _jobs_of(directory: RunDirectory, entry: Mapping[str, Any]) -> list[str]:
    known = {job for one in run_jobs.submissions(directory) for job in one.jobs}
    if entry.get("scheduler") == "local":
        return [job for job in _processes(str(entry["folder"])) if job not in known]
    index = entry.get("index")
    named = slurm.named(str(entry["name"]), user=directory.path.stat().st_uid)
    mine = [job for job in named if job not in known and job.partition("_")[2] == ("" if index is None else str(index))]
    # Another run may have the same name elsewhere.
    return [job for job in sorted(mine, key=_number) if _comes_from(job, Path(str(entry["folder"])))]


def _number(job: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job.split("_") if part.isdecimal())


def _comes_from(job: str, folder: Path) -> bool:
    script = slurm.show_job(job).get("Command", "")
    return bool(script) and folder in Path(script).parents


def _processes(folder: str) -> list[str]:
    """The job's first process, the number of which submitit gives as the job's, on this machine."""
    import psutil

    lines = {one.pid: (one.ppid(), " ".join(one.info["cmdline"] or ())) for one in psutil.process_iter(["cmdline"])}
    mine = {pid for pid, (_, line) in lines.items() if folder in line and "submitit" in line}
    return [str(pid) for pid in sorted(mine) if lines[pid][0] not in mine]
