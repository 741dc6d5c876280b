"""States of the runs of a study, from their directories and the scheduler, or from the database where neither knows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from launch import run_jobs
from launch.sweeps.database import ACTIVE, READY, WAITING, RunRow
from launch.sweeps.outcome import astray_by, outcome
from launch.sweeps.study_directory import StudyDirectory, StudyRun
from megatron_qwen import slurm
from megatron_qwen.rundir import RunDirectory, RunState
from tools.scaling.observations import DIVERGED, DONE, FAILED, UNFINISHED

ENDED = (DONE, DIVERGED, FAILED)
# A run whose job disappeared without a recorded end is submitted again, at most so often.
_MOST_SUBMISSIONS = 3
_OF_THE_STEM = "its stem"


def look(
    study: StudyDirectory, runs: Sequence[StudyRun], known: dict[str, RunRow], *, ask: bool = True
) -> dict[str, RunRow]:
    """State of every run, from its directory and the scheduler.

    Args:
        study: the directory.
        runs: of the study, stems first.
        known: what the database says.
        ask: whether to ask the scheduler; without it running runs look ready.
    """
    alive = _alive(study, runs) if ask else {}
    rows: dict[str, RunRow] = {}
    for run in runs:
        directory = RunDirectory(study.runs / run.name)
        old = known.get(run.name)
        if old is None:
            old = RunRow(run.name, run.kind, READY, submissions=len(run_jobs.submissions(directory)))
        if (
            run.name in alive
        ):  # the scheduler was asked before the files are read, so a run that ends in between is still active
            rows[run.name] = replace(old, status=ACTIVE, why=alive[run.name])
            continue
        if old.status in (DONE, DIVERGED) and directory.state() in (RunState.DONE, RunState.STOPPED):
            rows[run.name] = old
            continue
        stem = None if run.stem is None else study.runs / run.stem
        found = outcome(directory.path, iterations=run.iterations, stem=stem, begins=run.begins)
        # Progress resets the count: only submissions without progress count as lost.
        row = replace(
            old, iteration=found.iteration, submissions=1 if found.iteration > old.iteration else old.submissions
        )
        if found.status != UNFINISHED:
            loss = found.loss if found.status == DONE else None
            rows[run.name] = replace(row, status=found.status, why=found.why, loss=loss)
        elif ask and row.submissions >= _MOST_SUBMISSIONS:
            rows[run.name] = replace(row, status=FAILED, why=f"its job was lost {row.submissions} times")
        elif old.status == FAILED and not old.why.startswith(_OF_THE_STEM):
            rows[run.name] = row  # refused; `resume` tries again
        else:
            rows[run.name] = _waiting(study, run, row, rows)
    return rows


def _alive(study: StudyDirectory, runs: Sequence[StudyRun]) -> dict[str, str]:
    """Runs whose job is pending or running, with what a person must know about it.

    Also those whose job a controller was killed before it could note: it is found by its name.
    """
    directories = {run.name: RunDirectory(study.runs / run.name) for run in runs}
    directories = {name: one for name, one in directories.items() if one.path.exists()}
    submissions = {name: run_jobs.submissions(one) for name, one in directories.items()}
    noted = {name: {job for one in each for job in one.jobs} for name, each in submissions.items()}
    # A run on Slurm does not count as lost because squeue is missing on this machine: then the query must fail.
    asked = slurm.is_there() or any(each and each[-1].scheduler == "slurm" for each in submissions.values())
    queue = slurm.queue() if asked else {}
    unnoted = _unnoted(study, runs, queue, noted)
    local = [line for line in _command_lines() if str(study.runs) in line]
    found: dict[str, str] = {}
    for run in runs:
        directory = directories.get(run.name)
        if run.name in unnoted:
            found[run.name] = ""
        elif directory is None:
            continue
        elif jobs := run_jobs.active(directory, queue):
            found[run.name] = _held(jobs, queue)
        elif any(str(directory.submission) in line for line in local):
            found[run.name] = ""
    return found


def _unnoted(
    study: StudyDirectory, runs: Sequence[StudyRun], queue: dict[str, slurm.QueuedJob], noted: dict[str, set[str]]
) -> set[str]:
    """Runs that have a job by its name, or are members of an array by its, which their directories do not name."""
    alive: dict[str, set[str]] = {}
    for job in queue.values():
        if job.state not in slurm.ENDED:
            alive.setdefault(job.name, set()).add(job.job_id)
    found = {run.name for run in runs if alive.get(study.job_name(run), set()) - noted.get(run.name, set())}
    for array, members in study.arrays().items():
        for number in {job.partition("_")[0] for job in alive.get(array, ())}:
            found |= {name for name in members if number not in {job.partition("_")[0] for job in noted.get(name, ())}}
    return found


def _held(jobs: Sequence[str], queue: dict[str, slurm.QueuedJob]) -> str:
    held = [job for job in jobs if job in queue and queue[job].is_held]
    return f"held by Slurm ({queue[held[0]].reason}): scontrol release {' '.join(held)}" if held else ""


def _command_lines() -> list[str]:
    """Of the processes of this machine that live."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


def _waiting(study: StudyDirectory, run: StudyRun, row: RunRow, rows: dict[str, RunRow]) -> RunRow:
    """State of a run that is not active: ready, waiting for its stem, or impossible because of its stem."""
    if run.stem is None or RunDirectory(study.runs / run.name).run_yaml.is_file():
        return replace(row, status=READY, why="")
    stem = rows[run.stem]
    if study.branching_point(run) is not None:
        if why := astray_by(study.runs / run.stem, run.begins):
            return replace(row, status=DIVERGED, why=f"{_OF_THE_STEM} diverged before it: {why}")
        return replace(row, status=READY, why="")
    if stem.status == DIVERGED:
        return replace(row, status=DIVERGED, why=f"{_OF_THE_STEM} diverged: {stem.why}")
    if stem.status == FAILED:
        return replace(row, status=FAILED, why=f"{_OF_THE_STEM} failed: {stem.why}"[:500])
    if stem.status == DONE:
        return replace(row, status=FAILED, why=f"{_OF_THE_STEM} has no checkpoint of iteration {run.begins}")
    return replace(row, status=WAITING, why=f"for iteration {run.begins} of {run.stem}")


def table(rows: dict[str, RunRow], controller: str | None, path: Path) -> str:
    """The state of a study, for a terminal."""
    counts = Counter((row.kind, row.status) for row in rows.values())
    lines = [f"{path}: controller {controller or 'not running; `mq sweep resume` starts it'}"]
    for kind in ("stem", "cell"):
        each = {status: count for (which, status), count in counts.items() if which == kind}
        if each:
            lines.append(f"{kind}s: " + ", ".join(f"{count} {status}" for status, count in sorted(each.items())))
    lines += [
        f"{row.name}: {row.status} at iteration {row.iteration}{f' ({row.why})' if row.why else ''}"
        for row in rows.values()
        if row.status in (ACTIVE, DIVERGED, FAILED)
    ]
    return "\n".join(lines)
