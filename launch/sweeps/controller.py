"""Brings a study to its end: looks at every run, hands over what is ready, and notes what became of it."""

import subprocess
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
from megatron_qwen.rundir import RunDirectory, RunState
from tools.scaling.observations import DIVERGED, DONE, FAILED, UNFINISHED
from tools.scaling.outcome import astray_by, outcome

ENDED = (DONE, DIVERGED, FAILED)
# A run whose job is gone without a word is handed over again; one that is lost so often is not.
_MOST_SUBMISSIONS = 3
_BEAT_S = 20.0
_OF_THE_STEM = "its stem"


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
        self._said: dict[str, str] = {}

    def run(self, *, poll_s: float) -> dict[str, Row]:
        """Goes on until every run has ended; returns how each stands."""
        while True:
            try:
                rows = self.step()
            except slurm.SlurmError as error:  # it may be starting again: jobs do without it, and so does this
                self._say_once("Slurm", f"waiting for Slurm: {' '.join(str(error).split())}")
            else:
                if all(row.status in ENDED for row in rows.values()):
                    return rows
            self._wait(poll_s)

    def _wait(self, seconds: float) -> None:
        """Sleeps, and says meanwhile that it is alive."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _BEAT_S))
            self.database.beat()

    def _say_once(self, about: str, line: str) -> None:
        if self._said.get(about) != line:
            self._said[about] = line
            self.say(line)

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
            self.database.beat()
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
        """Submits one run; what is wrong with it is its own failure, what is wrong with the place is waited for."""
        if outcome(self.study.runs / run.name, iterations=run.iterations).status != UNFINISHED:
            return row  # it has just ended: the next look says how
        try:
            request = make(
                self.recipe,
                list(run.overrides),
                nodes=self.place.nodes,
                cluster=self.place.cluster,
                name=self.study.job_name(run),
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
        except (slurm.SlurmError, subprocess.TimeoutExpired, OSError) as error:
            return self._later(row, " ".join(str(error).split()))
        except UserError as error:
            if any(problem.where == "run" for problem in error.problems):  # another command has it in hand
                return self._later(row, " ".join(str(error).split()))
            return replace(row, status=FAILED, why=" ".join(str(error).split())[:500])
        if submitted is None:
            return self._later(row, "the place is not fit for it (see above)") if code else row
        self.say(f"{run.name}: handed over as job {', '.join(submitted.jobs)}")
        return replace(row, status=ACTIVE, why="", submissions=row.submissions + 1)

    def _later(self, row: Row, why: str) -> Row:
        self._say_once(row.name, f"{row.name}: not handed over yet ({why[:300]})")
        return row


def look(study: StudyDirectory, runs: Sequence[Run], known: dict[str, Row], *, ask: bool = True) -> dict[str, Row]:
    """How every run stands, by its directory and the scheduler.

    Args:
        study: the directory.
        runs: of the study, stems first.
        known: what the database says.
        ask: whether to ask the scheduler; without it what is under way looks ready.
    """
    alive = _alive(study, runs) if ask else set()
    rows: dict[str, Row] = {}
    for run in runs:
        directory = RunDirectory(study.runs / run.name)
        old = known.get(run.name)
        if old is None:
            old = Row(run.name, run.kind, READY, submissions=len(run_jobs.submissions(directory)))
        if run.name in alive:  # asked before its files are read: what has ended since has said how
            rows[run.name] = replace(old, status=ACTIVE, why="")
            continue
        if old.status in (DONE, DIVERGED) and directory.state() in (RunState.DONE, RunState.STOPPED):
            rows[run.name] = old
            continue
        found = outcome(directory.path, iterations=run.iterations)
        # What got further than the time before was not lost in vain.
        row = replace(
            old, iteration=found.iteration, submissions=1 if found.iteration > old.iteration else old.submissions
        )
        if found.status != UNFINISHED:
            loss = found.loss if found.status == DONE else None
            rows[run.name] = replace(row, status=found.status, why=found.why, loss=loss)
        elif row.submissions >= _MOST_SUBMISSIONS:
            rows[run.name] = replace(row, status=FAILED, why=f"its job was lost {row.submissions} times")
        elif old.status == FAILED and not old.why.startswith(_OF_THE_STEM):
            rows[run.name] = row  # refused; `resume` tries again
        else:
            rows[run.name] = _waiting(study, run, row, rows)
    return rows


def _alive(study: StudyDirectory, runs: Sequence[Run]) -> set[str]:
    """Runs whose job waits or runs, also where a controller was killed before it could note the job."""
    directories = {run.name: RunDirectory(study.runs / run.name) for run in runs}
    directories = {name: one for name, one in directories.items() if one.path.exists()}
    noted = {name: jobs[-1] for name, one in directories.items() if (jobs := run_jobs.submissions(one))}
    # A run of Slurm's is not taken for lost because its programs are not here: they must answer.
    asked = slurm.is_there() or any(one.scheduler == "slurm" for one in noted.values())
    queue = slurm.queue() if asked else {}
    names = {job.name for job in queue.values() if job.state not in slurm.ENDED}
    local = [line for line in _command_lines() if str(study.runs) in line]
    found: set[str] = set()
    for run in runs:
        directory = directories.get(run.name)
        if run.name not in noted and study.job_name(run) in names:
            found.add(run.name)
        elif directory is None:
            continue
        elif run_jobs.active(directory, queue) or any(str(directory.submission) in line for line in local):
            found.add(run.name)
    return found


def _command_lines() -> list[str]:
    """Of the processes of this machine that live."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


def _waiting(study: StudyDirectory, run: Run, row: Row, rows: dict[str, Row]) -> Row:
    """A run that is not under way: ready, or waiting for its stem, or never to be."""
    if run.stem is None or RunDirectory(study.runs / run.name).run_yaml.is_file():
        return replace(row, status=READY, why="")
    stem = rows[run.stem]
    if _branch_is_there(study, run):
        if why := astray_by(study.runs / run.stem, run.begins):
            return replace(row, status=DIVERGED, why=f"{_OF_THE_STEM} diverged before it: {why}")
        return replace(row, status=READY, why="")
    if stem.status == DIVERGED:
        return replace(row, status=DIVERGED, why=f"{_OF_THE_STEM} diverged: {stem.why}")
    if stem.status == FAILED:
        return replace(row, status=FAILED, why=f"{_OF_THE_STEM} failed: {stem.why}"[:500])
    if stem.status == DONE:
        return replace(row, status=FAILED, why=f"{_OF_THE_STEM} kept no checkpoint of iteration {run.begins}")
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
