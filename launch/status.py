"""``mq launch status``: many runs in one table, from their own files and one question to Slurm."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import run_jobs
from megatron_qwen import slurm
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.json_lines import objects
from megatron_qwen.metrics.console import duration
from megatron_qwen.rundir import RunDirectory, RunState

# Of metrics.jsonl only the end is read: a status of 500 runs must take no more than 2 s (mq bench launch).
_TAIL_BYTES = 4096
_RECENT_STEPS = 5


@dataclass(frozen=True)
class RunStatus:
    """A row of the table.

    Args:
        run: its directory.
        state: queued, running, requeued, held, stopped, cancelled, done, lost or unknown.
        reason: why it is in that state.
        iteration: last one.
        train_iters: of the whole run.
        loss: newest.
        tokens_per_second: newest.
        seconds_left: until the last iteration, at the pace of the newest steps.
        attempts: number of them.
        jobs: ids that wait or run.
        nodes: where it runs.
        advice: a command that helps, where one does.
    """

    run: str
    state: str
    reason: str
    iteration: int | None
    train_iters: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    attempts: int
    jobs: tuple[str, ...]
    nodes: str
    advice: str


def find_runs(places: Sequence[Path]) -> list[RunDirectory]:
    """Run directories: those named, and those directly inside a directory that is named.

    Raises:
        ConfigError: a place holds none.
    """
    found: list[RunDirectory] = []
    problems: list[Problem] = []
    for place in places:
        if _is_run(place):
            found.append(RunDirectory(place))
            continue
        inside = sorted(path for path in place.iterdir() if _is_run(path)) if place.is_dir() else []
        if not inside:
            problems.append(Problem("RUN", place, "is not a run directory and contains none."))
        found += [RunDirectory(path) for path in inside]
    if problems:
        raise ConfigError(problems)
    return found


def _is_run(path: Path) -> bool:
    """Whether a run lies here that may be read; a shared run root holds others' too."""
    return os.access(path / "run.yaml", os.R_OK)


def collect(runs: Sequence[RunDirectory]) -> list[RunStatus]:
    """The rows; Slurm is asked once, and what it does not answer is left to the runs' own files."""
    submitted = {run.path: run_jobs.submissions(run) for run in runs}
    newest = {path: found[-1] for path, found in submitted.items() if found}
    queue: dict[str, slurm.QueuedJob] = {}
    kept: dict[str, str] = {}
    ids = [job for item in newest.values() if item.scheduler == "slurm" for job in item.jobs]
    asked = False
    if ids and slurm.is_there():
        try:
            queue, asked = slurm.queue(), True
        except UserError:
            asked = False
        gone = [job for job in ids if job not in queue]
        kept = slurm.accounting(gone) if asked and gone else {}
    return [_status(run, newest.get(run.path), queue, kept, asked=asked) for run in runs]


def _status(
    run: RunDirectory,
    newest: run_jobs.Submission | None,
    queue: dict[str, slurm.QueuedJob],
    kept: dict[str, str],
    *,
    asked: bool,
) -> RunStatus:
    noted = _json(run.status)
    record, pace_s = _newest_step(run.metrics)
    state, reason = str(noted.get("state", "unknown")), str(noted.get("reason") or "")
    jobs: list[str] = []
    nodes, advice = "", ""
    if newest is not None and (newest.scheduler == "local" or asked):
        jobs = run_jobs.active(run, queue)
        state, reason, advice = _with_scheduler(run, newest, jobs, queue, kept, state=state, reason=reason)
        nodes = next((queue[job].nodes for job in jobs if job in queue and queue[job].nodes), "")
    if state == RunState.STOPPED and noted.get("checkpoint"):
        reason += f"; last good checkpoint: {Path(str(noted['checkpoint'])).name}"
    total = _train_iters(run)
    iteration = _number(record.get("iteration"))
    left = None
    if state == RunState.RUNNING and pace_s is not None and total is not None and iteration is not None:
        left = (total - iteration) * pace_s
    return RunStatus(
        run=str(run.path),
        state=state,
        reason=reason,
        iteration=None if iteration is None else int(iteration),
        train_iters=total,
        loss=_number(record.get("lm_loss")),
        tokens_per_second=_number(record.get("tokens_per_second")) if state == RunState.RUNNING else None,
        seconds_left=left,
        attempts=AttemptLog(run.attempts).newest(),
        jobs=tuple(jobs),
        nodes=nodes,
        advice=advice,
    )


def _with_scheduler(
    run: RunDirectory,
    newest: run_jobs.Submission,
    jobs: Sequence[str],
    queue: dict[str, slurm.QueuedJob],
    kept: dict[str, str],
    *,
    state: str,
    reason: str,
) -> tuple[str, str, str]:
    """State, reason and advice, where the run's own word is out of date."""
    unfinished = state in (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED)
    held = [queue[job] for job in jobs if job in queue and queue[job].is_held]
    if held:
        command = f"scontrol release {' '.join(job.job_id for job in held)}"
        return "held", held[0].reason, f"{command}   (or: mq launch requeue {shlex.quote(str(run.path))})"
    if not unfinished:
        return state, reason, f"mq launch requeue {shlex.quote(str(run.path))}" if state == RunState.STOPPED else ""
    waiting = [queue[job] for job in jobs if job in queue and queue[job].state == "PENDING"]
    if waiting and len(waiting) == len(jobs):
        return (state if state == RunState.REQUEUED else RunState.QUEUED), f"waits: {waiting[0].reason}", ""
    if not jobs:
        ends = {kept[job] for job in newest.jobs if job in kept} | {
            queue[job].state for job in newest.jobs if job in queue
        }
        how = f"Slurm reports {', '.join(sorted(ends))}" if ends else "its job is gone"
        return "lost", f"{how}, and no end was recorded", f"mq launch requeue {shlex.quote(str(run.path))}"
    return RunState.RUNNING, "" if state != RunState.RUNNING else reason, ""


def _newest_step(metrics: Path) -> tuple[dict[str, Any], float | None]:
    """The last whole line of metrics.jsonl, and seconds a step lately; only the end of the file is read."""
    if not metrics.is_file():
        return {}, None
    with metrics.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines()[0 if size <= _TAIL_BYTES else 1 :]
    records = list(objects(lines[-_RECENT_STEPS:]))
    times = [time_s for record in records if (time_s := _number(record.get("step_time_s"))) is not None]
    return (records[-1] if records else {}), (sum(times) / len(times) if times else None)


def _train_iters(run: RunDirectory) -> int | None:
    """``training.train_iters`` of run.yaml, found without reading all of it: a table may have hundreds of runs."""
    try:
        for line in run.run_yaml.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "  train_iters":
                return int(value)
    except (OSError, ValueError):
        return None
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


_COLUMNS = ("run", "state", "iteration", "loss", "tokens/s", "left", "attempts", "jobs", "reason")


def table(rows: Sequence[RunStatus]) -> str:
    """The table for people; what needs a hand comes below it, with the command."""
    cells = [_cells(row) for row in rows]
    widths = [max(len(line[index]) for line in [_COLUMNS, *cells]) for index in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [_COLUMNS, *cells]
    ]
    lines += [f"\n{Path(row.run).name} is {row.state}: {row.advice}" for row in rows if row.advice]
    return "\n".join(lines)


def _cells(row: RunStatus) -> tuple[str, ...]:
    total = f"/{row.train_iters}" if row.train_iters is not None else ""
    return (
        Path(row.run).name,
        row.state,
        f"{row.iteration}{total}" if row.iteration is not None else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "",
        duration(row.seconds_left) if row.seconds_left is not None else "",
        str(row.attempts),
        ",".join(row.jobs) + (f" on {row.nodes}" if row.nodes else ""),
        row.reason if len(row.reason) <= 100 else row.reason[:97] + "...",
    )


def as_json(rows: Sequence[RunStatus]) -> str:
    """The same for programs."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def watch(places: Sequence[Path], *, every_s: float) -> None:
    """Shows the table again and again until Ctrl-C, or until no run is under way any more."""
    while True:
        rows = collect(find_runs(places))
        print(f"\x1b[H\x1b[2J{time.strftime('%H:%M:%S')}\n{table(rows)}", flush=True)
        if all(row.state in (RunState.DONE, RunState.STOPPED, RunState.CANCELLED) for row in rows):
            return
        time.sleep(every_s)
