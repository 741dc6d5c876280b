"""Brings a study to its end: looks at every run, hands over what is ready, and notes what became of it."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from launch import preflight, run_jobs, submit
from launch.request import make
from launch.sweeps.database import ACTIVE, READY, WAITING, Database, Row
from launch.sweeps.study_directory import Run, StudyDirectory
from megatron_qwen import slurm
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.errors import UserError
from megatron_qwen.rundir import RunDirectory
from tools.scaling.observations import DIVERGED, DONE, FAILED, UNFINISHED
from tools.scaling.outcome import astray_by, outcome

ENDED = (DONE, DIVERGED, FAILED)
# A run whose job is gone without a word is handed over again; one that is lost so often is not.
_MOST_SUBMISSIONS = 3


@dataclass(frozen=True)
class Place:
    """Where runs go.

    Args:
        cluster: name or path of a cluster file; None picks one.
        nodes: of a run.
        ranks_per_node: instead of the cluster's.
        at_once: runs that may wait or run together.
    """

    cluster: str | None
    nodes: int
    ranks_per_node: int | None
    at_once: int


class Controller:
    """Runs a study; one at a time may act on it.

    Args:
        study: its directory.
        database: its state, of which this process is the controller.
        place: where runs go.
        say: gets a line for everything that changes.
    """

    def __init__(self, study: StudyDirectory, database: Database, place: Place, say: Callable[[str], None]) -> None:
        self.study, self.database, self.place, self.say = study, database, place, say
        plan = study.plan()
        self.recipe = str(plan.content["recipe"])
        self.runs = study.all_runs(plan)

    def run(self, *, poll_s: float) -> dict[str, Row]:
        """Goes on until every run has ended; returns how each stands."""
        while True:
            rows = self.step()
            if all(row.status in ENDED for row in rows.values()):
                return rows
            time.sleep(poll_s)

    def step(self) -> dict[str, Row]:
        """Looks once, and hands over what is ready and fits."""
        self.database.beat()
        rows = look(self.study, self.runs, self.database.rows())
        self._note(rows)
        active = sum(row.status == ACTIVE for row in rows.values())
        for run in self.runs:
            if rows[run.name].status != READY:
                continue
            if active >= self.place.at_once:
                break
            rows[run.name] = self._hand_over(run, rows[run.name])
            active += rows[run.name].status == ACTIVE
            self.database.write([rows[run.name]])
        return rows

    def _note(self, rows: dict[str, Row]) -> None:
        before = self.database.rows()
        changed = [row for row in rows.values() if before.get(row.name) != row]
        for row in changed:
            old = before.get(row.name)
            if row.status in ENDED and (old is None or old.status != row.status):
                loss = f", loss {row.loss:.4f}" if row.loss is not None else ""
                self.say(f"{row.name}: {row.status}{loss}{f' ({row.why})' if row.why else ''}")
        self.database.write(changed)

    def _hand_over(self, run: Run, row: Row) -> Row:
        """Submits one run; what is wrong with it is its own failure and not the study's."""
        if row.submissions >= _MOST_SUBMISSIONS:
            return replace(row, status=FAILED, why=f"its job was lost {row.submissions} times")
        try:
            request = make(
                self.recipe,
                list(run.overrides),
                nodes=self.place.nodes,
                cluster=self.place.cluster,
                name=run.name,
                run_dir=self.study.runs / run.name,
                ranks_per_node=self.place.ranks_per_node,
            )
            found = preflight.check(request, on_site=False)
            wrong = [str(item.problem) for item in found.findings if item.severity != "warning"]
            if wrong:
                return replace(row, status=FAILED, why="; ".join(wrong)[:500])
            # Noted before: a controller that is killed in between finds the job by its name.
            self.database.write([replace(row, status=ACTIVE, submissions=row.submissions + 1)])
            submitted, code = submit.submit(request, new_code=False)
        except slurm.SlurmError as error:
            self.say(f"{run.name}: not handed over yet ({str(error).strip()})")
            return row
        except UserError as error:
            return replace(row, status=FAILED, why=" ".join(str(error).split())[:500])
        if submitted is None:
            return replace(row, status=FAILED, why=f"was refused (exit {code})") if code else row
        self.say(f"{run.name}: handed over as job {', '.join(submitted.jobs)}")
        return replace(row, status=ACTIVE, why="", submissions=row.submissions + 1)


def look(study: StudyDirectory, runs: Sequence[Run], known: dict[str, Row]) -> dict[str, Row]:
    """How every run stands, by its directory and the scheduler.

    Args:
        study: the directory.
        runs: of the study, stems first.
        known: what the database says; needed for what never began only.
    """
    queue = slurm.queue() if slurm.is_there() else {}
    names = {job.name for job in queue.values() if job.state not in slurm.ENDED}
    rows: dict[str, Row] = {}
    for run in runs:
        directory = RunDirectory(study.runs / run.name)
        old = known.get(run.name, Row(run.name, run.kind, READY))
        submissions = max(old.submissions, len(run_jobs.submissions(directory)))
        row = replace(old, submissions=submissions)
        found = outcome(directory.path, iterations=run.iterations)
        row = replace(row, iteration=found.iteration)
        if found.status != UNFINISHED:
            loss = found.loss if found.loss == found.loss and found.status == DONE else None
            rows[run.name] = replace(row, status=found.status, why=found.why, loss=loss)
        elif run.name in names or run_jobs.active(directory, queue) or _starting(directory):
            rows[run.name] = replace(row, status=ACTIVE, why="")
        elif old.status == FAILED and not directory.path.exists():
            rows[run.name] = row  # refused before it began
        else:
            rows[run.name] = _waiting(study, run, row, rows)
    return rows


def _starting(directory: RunDirectory) -> bool:
    """Whether a process of this machine carries the run though nobody has noted it yet."""
    marked = str(directory.submission)
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and marked in (process.info["cmdline"] or ()):
            return True
    return False


def _waiting(study: StudyDirectory, run: Run, row: Row, rows: dict[str, Row]) -> Row:
    """A run that is not under way: ready, or waiting for its stem, or never to be."""
    if run.stem is None or RunDirectory(study.runs / run.name).run_yaml.is_file():
        return replace(row, status=READY, why="")
    stem = rows[run.stem]
    if _branch_is_there(study, run):
        if why := astray_by(study.runs / run.stem, run.begins):
            return replace(row, status=DIVERGED, why=f"its stem diverged before it: {why}")
        return replace(row, status=READY, why="")
    if stem.status == DIVERGED:
        return replace(row, status=DIVERGED, why=f"its stem diverged: {stem.why}")
    if stem.status == FAILED:
        return replace(row, status=FAILED, why=f"its stem failed: {stem.why}"[:500])
    if stem.status == DONE:
        return replace(row, status=FAILED, why=f"its stem kept no checkpoint of iteration {run.begins}")
    return replace(row, status=WAITING, why=f"for iteration {run.begins} of {run.stem}")


def _branch_is_there(study: StudyDirectory, run: Run) -> bool:
    assert run.stem is not None
    root = RunDirectory(study.runs / run.stem).checkpoints
    return run.begins in {iteration for iteration, _ in committed(root)}


def table(rows: dict[str, Row], controller: str | None, path: Path) -> str:
    """How a study stands, for a terminal."""
    counts = Counter((row.kind, row.status) for row in rows.values())
    lines = [f"{path}: controller {controller or 'not at work; `mq sweep resume` starts it'}"]
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
