"""The loop of a study: reads the state of every run, submits runs that are ready, and records their results."""

import time
from collections.abc import Callable

from launch.sweeps import adapt
from launch.sweeps.database import ACTIVE, READY, Database, RunRow
from launch.sweeps.handover import HandOver, Place
from launch.sweeps.look import ENDED, look
from launch.sweeps.observe import observed
from launch.sweeps.plan import document, write
from launch.sweeps.plan_file import PlanFile, merged
from launch.sweeps.study_directory import StudyDirectory
from megatron_qwen import slurm
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import DONE

_BEAT_S = 20.0  # several within database.STALE_S, after which a controller counts as dead
# Bootstrap resamples by which a round judges how flat an optimum is; `mq sweep fit` reports intervals and takes more.
_DRAWS = 200


class StudyController:
    """Runs a study; one controller at a time may act on it.

    Args:
        study: its directory.
        database: its state, of which this process is the controller.
        place: where runs go.
        say: gets a line for everything that changes.
    """

    def __init__(self, study: StudyDirectory, database: Database, place: Place, say: Callable[[str], None]) -> None:
        self.study, self.database, self.say = study, database, say
        plan = study.plan()
        self.runs = study.all_runs(plan)
        self.rounds = int(plan.content.get("adaptive_rounds") or 0)
        self.hand_over = HandOver(study, str(plan.content["recipe"]), place, database, say, self._later)
        self._said: dict[str, str] = {}

    def run(self, *, poll_s: float) -> dict[str, RunRow]:
        """Loops until every run has ended; returns the state of each."""
        while True:
            try:
                rows = self.step()
            except slurm.SlurmError as error:  # it may be starting again: jobs do without it, and so does this
                self._say_once("Slurm", f"waiting for Slurm: {' '.join(str(error).split())}")
            else:
                if all(row.status in ENDED for row in rows.values()):
                    if not self._widened(rows):
                        return rows
                    continue
            self._wait(poll_s)

    def _widened(self, rows: dict[str, RunRow]) -> bool:
        """Whether an adaptive study has runs to add, now that all have ended; they are noted before any begins."""
        number = len(self.study.rounds()) + 1
        if number > self.rounds:
            return False
        plan = self.study.plan()
        observations, _ = observed(plan, self.study, rows)
        if not any(one.status == DONE for one in observations):
            return False
        found = adapt.next_round(plan, observations, fit(observations, Settings(draws=_DRAWS)))
        if found is None:
            return False
        for line in (*found.warnings, *(f"{one.what} left out: {one.reason}" for one in found.dropped)):
            self.say(f"round {number}: {line}")
        if not found.cells:
            return False
        content, path = document(found), self.study.next_round()
        merged(plan, [PlanFile(path, content)])  # a round that contradicts the plan is not written
        write(path, content)
        self.runs = self.study.all_runs(self.study.plan())
        return True

    def _wait(self, seconds: float) -> None:
        """Sleeps, and renews the heartbeat that keeps a second controller out."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _BEAT_S))
            self.database.beat()

    def _say_once(self, about: str, line: str) -> None:
        if self._said.get(about) != line:
            self._said[about] = line
            self.say(line)

    def step(self) -> dict[str, RunRow]:
        """One iteration: reads all states, and submits runs that are ready while there is room."""
        self.database.beat()
        rows = look(self.study, self.runs, self.database.rows())
        self._note(rows)
        room = self.hand_over.at_once - sum(row.status == ACTIVE for row in rows.values())
        ready = [run for run in self.runs if rows[run.name].status == READY]
        while ready and room > 0:
            chosen, ready = ready[:room], ready[room:]
            for group in self.hand_over.groups(chosen):
                self.database.beat()
                now = self.hand_over(group, rows)
                self.database.write(now)
                rows |= {row.name: row for row in now}
                room -= sum(row.status == ACTIVE for row in now)
        return rows

    def _note(self, rows: dict[str, RunRow]) -> None:
        before = self.database.rows()
        changed = [row for row in rows.values() if before.get(row.name) != row]
        for row in changed:
            old = before.get(row.name)
            if row.status in ENDED and (old is None or old.status != row.status):
                loss = f", loss {row.loss:.4f}" if row.loss is not None else ""
                self.say(f"{row.name}: {row.status}{loss}{f' ({row.why})' if row.why else ''}")
            elif row.status == ACTIVE and row.why:
                self._say_once(row.name, f"{row.name}: {row.why}")
        self.database.write(changed)

    def _later(self, name: str, why: str) -> None:
        self._say_once(name, f"{name}: not submitted yet ({why[:300]})")
