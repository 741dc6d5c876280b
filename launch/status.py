"""``mq launch status``: many runs in one table, from their own files and one question to Slurm."""

import functools
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import by_hand, orphans, run_jobs
from launch.storage_wait import storage_fault
from megatron_qwen import slurm
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.json_lines import objects
from megatron_qwen.metrics.console import duration
from megatron_qwen.rundir import RunDirectory, RunState

# Of metrics.jsonl only the end is read: a status of 500 runs must take no more than 2 s (mq bench launch).
_TAIL_BYTES = 4096
_RECENT_STEPS = 5
# What a run without a job may look like while somebody trains it by hand (mq train).
_MAY_BE_BY_HAND = (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED, "lost", "unknown")


@dataclass(frozen=True)
class RunStatus:
    """A row of the table.

    Args:
        run: its directory.
        state: queued, running, requeued, held, suspended, stopped, cancelled, done, lost or unknown.
        reason: why it is in that state.
        iteration: last one.
        train_iters: of the whole run.
        loss: newest.
        tokens_per_second: newest.
        seconds_left: until the last iteration, at the pace of the newest steps.
        silent_s: since the last sign of life of its ranks, while it runs.
        attempts: number of them.
        jobs: ids that wait or run.
        nodes: where it runs.
        advice: a command that helps, where one does.
        saving: what the interval of checkpoints loses, as performance.json has it; None before the first save.
        storage: what is wrong with the file system that a waiting run waits for, empty if nothing is known to be.
        avoids: nodes that Slurm keeps its job from.
        not_avoided: bad nodes that it does not, and why.
        stragglers: the ranks that the others wait for, while it runs: rank, node, score, cause.
    """

    run: str
    state: str
    reason: str
    iteration: int | None
    train_iters: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    silent_s: float | None
    attempts: int
    jobs: tuple[str, ...]
    nodes: str
    advice: str
    saving: dict[str, Any] | None = None
    storage: str = ""
    avoids: tuple[str, ...] = ()
    not_avoided: str = ""
    stragglers: tuple[dict[str, Any], ...] = ()


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
        if place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
            fix = f"may not be read by you; {_owner(RunDirectory(place))} can open it to a group: chmod g+rX."
            problems.append(Problem("RUN", place, fix))
            continue
        inside = sorted(path for path in place.iterdir() if _is_run(path)) if place.is_dir() else []
        if not inside:
            problems.append(Problem("RUN", place, "is not a run directory and contains none."))
        found += [RunDirectory(path) for path in inside]
    if problems:
        raise ConfigError(problems)
    return found


def _is_run(path: Path) -> bool:
    """Whether this is a run that may be read; a shared run root holds others' too."""
    return os.access(path / "run.yaml", os.R_OK)


@dataclass(frozen=True)
class Look:
    """What a look at runs has found.

    Args:
        rows: one a run.
        unasked: why Slurm was not asked of jobs that the runs have, so that the rows are what their own files say last;
            None where it was.
    """

    rows: list[RunStatus]
    unasked: str | None = None

    @property
    def needs_a_hand(self) -> list[RunStatus]:
        """Runs that do not continue, or are not known to."""
        well = (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED, RunState.DONE, RunState.CANCELLED)
        return [row for row in self.rows if row.state not in well or row.storage]


def collect(runs: Sequence[RunDirectory]) -> Look:
    """The rows; Slurm is asked once, and what it does not answer is left to the runs' own files."""
    for run in runs:
        orphans.settle_where_possible(run)
    submitted = {run.path: run_jobs.submissions(run) for run in runs}
    newest = {path: found[-1] for path, found in submitted.items() if found}
    queue: dict[str, slurm.QueuedJob] = {}
    kept: dict[str, str] = {}
    ids = [job for item in newest.values() if item.scheduler == "slurm" for job in item.jobs]
    unasked = None
    if ids and not slurm.is_there():
        unasked = "this machine belongs to no Slurm cluster"
    elif ids:
        try:
            queue = slurm.jobs(ids)
            kept = slurm.accounting([job for job in ids if job not in queue])
        except UserError as error:
            unasked = "; ".join(map(str, error.problems))
    hides = functools.cache(slurm.hides_jobs)  # asked once, and only where it matters
    rows = [_status(run, newest.get(run.path), queue, kept, asked=unasked is None, hides=hides) for run in runs]
    open_ends = any(row.state in (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED, "unknown") for row in rows)
    return Look(rows, unasked if open_ends else None)


def _status(
    run: RunDirectory,
    newest: run_jobs.Submission | None,
    queue: dict[str, slurm.QueuedJob],
    kept: dict[str, str],
    *,
    asked: bool,
    hides: Callable[[], bool] = slurm.hides_jobs,
) -> RunStatus:
    noted = _json(run.status)
    record, pace_s = _newest_step(run.metrics)
    state, reason = str(noted.get("state", "unknown")), str(noted.get("reason") or "")
    jobs: list[str] = []
    nodes, advice = "", ""
    if newest is not None and (newest.scheduler == "local" or asked):
        jobs = run_jobs.active(run, queue)
        state, reason, advice = _with_scheduler(run, newest, jobs, queue, kept, hides=hides, state=state, reason=reason)
        if not jobs and orphans.is_being_submitted(run):  # the older ones do not matter
            state, reason, advice = RunState.QUEUED, "is being submitted", ""
        nodes = next((queue[job].nodes for job in jobs if job in queue and queue[job].nodes), "")
    if not jobs and state in (RunState.QUEUED, "lost") and orphans.is_cut_off(run):
        state, reason, advice = _cut_off(run, submitted_before=newest is not None)
    if not jobs and state in _MAY_BE_BY_HAND and (where := by_hand.place(run)) is not None:
        state, reason, advice = RunState.RUNNING, f"by hand: {where}", ""
    storage = ""
    waiting = next((queue[job] for job in jobs if job in queue and queue[job].state == "PENDING"), None)
    if waiting is not None and state in (RunState.QUEUED, RunState.REQUEUED):
        storage = storage_fault(run.path, str(noted.get("reason") or ""), waiting)
    if storage and storage not in reason:
        reason += f" (storage: {storage})"
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
        silent_s=_age(run.heartbeat) if state in (RunState.RUNNING, "suspended") else None,
        attempts=AttemptLog(run.attempts).newest(),
        jobs=tuple(jobs),
        nodes=nodes,
        advice=advice,
        saving=_json(run.performance).get("saving"),
        storage=storage,
        avoids=tuple(dict.fromkeys(node for job in jobs if job in queue for node in _excluded(queue[job]))),
        not_avoided=_not_avoided(noted) if jobs else "",
        stragglers=_stragglers(record) if state == RunState.RUNNING else (),
    )


def _cut_off(run: RunDirectory, *, submitted_before: bool) -> tuple[str, str, str]:
    """State, reason and advice where the newest submission was killed and none of its jobs is known."""
    if os.getuid() not in (0, run.path.stat().st_uid):
        return RunState.QUEUED, f"its submission was cut off; {_owner(run)}'s `mq launch status` finds its job", ""
    way = f"mq launch requeue {shlex.quote(str(run.path))}" if submitted_before else "give the submit command again"
    return "lost", "its submission was cut off, and Slurm has no job of it", way


def _excluded(job: slurm.QueuedJob) -> list[str]:
    return slurm.hostnames(job.excluded.replace("(null)", ""))


def _not_avoided(noted: dict[str, Any]) -> str:
    nodes = noted.get("not_avoided")
    return f"{', '.join(map(str, nodes))}: {noted.get('why_not_avoided')}" if isinstance(nodes, list) and nodes else ""


def _with_scheduler(
    run: RunDirectory,
    newest: run_jobs.Submission,
    jobs: Sequence[str],
    queue: dict[str, slurm.QueuedJob],
    kept: dict[str, str],
    *,
    hides: Callable[[], bool],
    state: str,
    reason: str,
) -> tuple[str, str, str]:
    """State, reason and advice, where the run's own word is out of date."""
    # A word about an earlier job, written when a newer one waited already, does not concern that one.
    newer = state == RunState.CANCELLED and jobs and not any(map(run.is_cancelled, jobs))
    state = RunState.QUEUED if newer else state
    unfinished = state in (RunState.QUEUED, RunState.RUNNING, RunState.REQUEUED)
    held = [queue[job] for job in jobs if job in queue and queue[job].is_held]
    if held:
        command = f"scontrol release {' '.join(job.job_id for job in held)}"
        return "held", held[0].reason, f"{command}   (or: mq launch requeue {shlex.quote(str(run.path))})"
    if not unfinished:
        return state, reason, f"mq launch requeue {shlex.quote(str(run.path))}" if state == RunState.STOPPED else ""
    waiting = [queue[job] for job in jobs if job in queue and queue[job].state == "PENDING"]
    if waiting and len(waiting) == len(jobs):
        if state == RunState.REQUEUED:
            return state, f"waits: {waiting[0].reason}" + (f" ({reason})" if reason else ""), ""
        return RunState.QUEUED, f"waits: {waiting[0].reason}", ""
    suspended = [job for job in jobs if job in queue and queue[job].state == "SUSPENDED"]
    if suspended:
        return "suspended", "an operator or Slurm has stopped it for a while", f"scontrol resume {' '.join(suspended)}"
    if not jobs and newest.scheduler == "slurm" and not kept.keys() & {*newest.jobs} and not _shown(run, hides):
        return state, f"Slurm does not show {_owner(run)}'s jobs to you; this is what the run noted last", ""
    if not jobs:
        ends = {kept[job] for job in newest.jobs if job in kept} | {
            queue[job].state for job in newest.jobs if job in queue
        }
        if ends == {"CANCELLED"}:  # of a job that waited, or whose controller was killed: nobody could note it
            return RunState.CANCELLED, "Slurm reports that its job was cancelled", ""
        how = f"Slurm reports {', '.join(sorted(ends))}" if ends else "its job is gone"
        return "lost", f"{how}, and no end was recorded", f"mq launch requeue {shlex.quote(str(run.path))}"
    return RunState.RUNNING, "" if state != RunState.RUNNING else reason, ""


def _shown(run: RunDirectory, hides: Callable[[], bool]) -> bool:
    """Whether Slurm would show the run's jobs to this user."""
    return os.getuid() in (0, run.path.stat().st_uid) or not hides()


def _owner(run: RunDirectory) -> str:
    try:
        return run.path.owner()
    except KeyError:
        return f"user {run.path.stat().st_uid}"


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


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


def _stragglers(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The slow ranks that a record of metrics.jsonl names, slowest first."""
    found = record.get("stragglers")
    return tuple(one for one in found if isinstance(one, dict)) if isinstance(found, list) else ()


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


_COLUMNS = ("run", "state", "iteration", "loss", "tokens/s", "left", "silent", "attempts", "jobs", "reason")


def table(rows: Sequence[RunStatus]) -> str:
    """The table for people; what needs a hand comes below it, with the command."""
    cells = [_cells(row) for row in rows]
    widths = [max(len(line[index]) for line in [_COLUMNS, *cells]) for index in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [_COLUMNS, *cells]
    ]
    lines += [f"\n{Path(row.run).name} is {row.state}: {row.advice}" for row in rows if row.advice]
    lines += [f"\n{Path(row.run).name} avoids {', '.join(row.avoids)}" for row in rows if row.avoids]
    lines += [f"\n{Path(row.run).name} does not avoid {row.not_avoided}" for row in rows if row.not_avoided]
    lines += [f"\n{Path(row.run).name} waits for slow ranks: {_named(row)}" for row in rows if row.stragglers]
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
        duration(row.silent_s) if row.silent_s is not None else "",
        str(row.attempts),
        ",".join(row.jobs) + (f" on {row.nodes}" if row.nodes else ""),
        row.reason if len(row.reason) <= 100 else row.reason[:97] + "...",
    )


def _named(row: RunStatus) -> str:
    return ", ".join(
        f"rank {one.get('rank')} on {one.get('node')} ({one.get('score')} of its peers' speed, {one.get('cause')})"
        for one in row.stragglers
    )


def as_json(rows: Sequence[RunStatus]) -> str:
    """The same for programs."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def watch(places: Sequence[Path], *, every_s: float) -> None:
    """Shows the table again and again until Ctrl-C, or until no run is under way any more."""
    while True:
        look = collect(find_runs(places))
        told = f"\nSlurm was not asked: {look.unasked}" if look.unasked else ""
        print(f"\x1b[H\x1b[2J{time.strftime('%H:%M:%S%z')}\n{table(look.rows)}{told}", flush=True)
        if all(row.state in (RunState.DONE, RunState.STOPPED, RunState.CANCELLED) for row in look.rows):
            return
        time.sleep(every_s)
