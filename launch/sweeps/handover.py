"""Hands runs of a study to the scheduler: one job each on a machine, on Slurm runs of one shape as an array."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import batched, groupby

from launch import cluster as clusters
from launch import preflight, submit
from launch.request import SubmitRequest, chosen_cluster, make
from launch.sweeps.arguments import AT_ONCE
from launch.sweeps.database import ACTIVE, Database, RunRow
from launch.sweeps.outcome import outcome
from launch.sweeps.study_directory import StudyDirectory, StudyRun
from megatron_qwen import slurm
from megatron_qwen.errors import UserError
from tools.scaling.observations import FAILED, UNFINISHED


@dataclass(frozen=True)
class Place:
    """Where runs go.

    Args:
        cluster: name or path of a cluster file; None picks one.
        nodes: of a run.
        ranks_per_node: instead of the cluster's.
        at_once: runs that may wait or run together; None is the scheduler's.
    """

    cluster: str | None
    nodes: int
    ranks_per_node: int | None
    at_once: int | None


class HandOver:
    """Submits runs.

    Args:
        study: whose runs they are.
        recipe: that they change.
        place: where they go.
        database: is told before a job is submitted: who is killed in between finds the job by its name.
        say: gets a line for everything that changes.
        later: gets a run and why it is not handed over yet.
    """

    def __init__(
        self,
        study: StudyDirectory,
        recipe: str,
        place: Place,
        database: Database,
        say: Callable[[str], None],
        later: Callable[[str, str], None],
    ) -> None:
        self.study, self.recipe, self.place, self.database, self.say, self.later = (
            study, recipe, place, database, say, later,
        )  # fmt: skip
        scheduler = clusters.load(chosen_cluster(place.cluster)).scheduler
        self.as_arrays = scheduler == "slurm"
        self.at_once = place.at_once or AT_ONCE[scheduler]
        # Fewer where Slurm has refused so many at once: sites limit arrays and jobs of a user.
        self._most = self.at_once

    def groups(self, runs: Sequence[StudyRun]) -> list[list[StudyRun]]:
        """Runs that go together, in the order of their first."""
        if not self.as_arrays:
            return [[run] for run in runs]
        order = {shape: place for place, shape in enumerate(dict.fromkeys((run.kind, run.shape) for run in runs))}
        ordered = sorted(runs, key=lambda run: order[run.kind, run.shape])
        found = [list(members) for _, members in groupby(ordered, key=lambda run: (run.kind, run.shape))]
        return [part for group in found for part in map(list, batched(group, self._most))]

    def __call__(self, runs: Sequence[StudyRun], rows: dict[str, RunRow]) -> list[RunRow]:
        """Submits a group; what is wrong with a run is its own failure, what is wrong with the place is waited for.

        Args:
            runs: of one group.
            rows: how they stand.

        Returns:
            How they stand now.
        """
        found: dict[str, RunRow] = {}
        requests: dict[str, SubmitRequest] = {}
        for run in runs:
            self.database.beat()
            row = rows[run.name]
            if outcome(self.study.runs / run.name, iterations=run.iterations).status != UNFINISHED:
                found[run.name] = row  # it has just ended: the next look says how
                continue
            answer = self._request(run)
            if isinstance(answer, SubmitRequest):
                requests[run.name] = answer
            else:
                found[run.name] = replace(row, status=FAILED, why=answer[:500]) if answer else row
        if requests:
            found |= self._submit([run for run in runs if run.name in requests], rows, requests)
        return [found[run.name] for run in runs]

    def _request(self, run: StudyRun) -> SubmitRequest | str:
        """What is to be submitted, or why that cannot be; an empty word where it may be possible later."""
        try:
            request = make(
                self.recipe,
                self.study.overrides(run),
                nodes=self.place.nodes,
                cluster=self.place.cluster,
                name=self.study.job_name(run),
                run_dir=self.study.runs / run.name,
                ranks_per_node=self.place.ranks_per_node,
            )
            found = preflight.check(request, on_site=False)
        except (slurm.SlurmError, subprocess.TimeoutExpired, OSError) as error:
            self.later(run.name, _line(error))
            return ""
        except UserError as error:
            return _line(error)
        wrong = [str(item.problem) for item in found.findings if item.severity != "warning"]
        return "; ".join(wrong) if wrong else request

    def _submit(
        self, runs: list[StudyRun], rows: dict[str, RunRow], requests: dict[str, SubmitRequest]
    ) -> dict[str, RunRow]:
        before = {run.name: rows[run.name] for run in runs}
        noted = {
            name: replace(row, status=ACTIVE, why="", submissions=row.submissions + 1) for name, row in before.items()
        }
        self.database.write(list(noted.values()))
        try:
            submitted = self._as_one(runs[0], requests) if len(runs) == 1 else self._as_array(runs, requests)
        except (slurm.SlurmError, subprocess.TimeoutExpired, OSError) as error:
            # Not now: of what has taken too long to answer it is not known whether it was taken.
            self._most = max(1, len(runs) // 2)
            return self._later(before, _line(error))
        except UserError as error:
            if len(runs) > 1:  # one by one each has its own say
                return {name: row for run in runs for name, row in self._submit([run], before, requests).items()}
            if any(problem.where == "run" for problem in error.problems):  # another command has it in hand
                return self._later(before, _line(error))
            return {name: replace(row, status=FAILED, why=_line(error)[:500]) for name, row in before.items()}
        self._most = min(self.at_once, 2 * self._most)
        return noted if submitted else before

    def _as_one(self, run: StudyRun, requests: dict[str, SubmitRequest]) -> bool:
        submitted, code = submit.submit(requests[run.name], new_code=False)
        if submitted is None:
            if code:
                self.later(run.name, "the cluster cannot take it (see above)")
            return False
        self.say(f"{run.name}: submitted as job {', '.join(submitted.jobs)}")
        return True

    def _as_array(self, runs: list[StudyRun], requests: dict[str, SubmitRequest]) -> bool:
        name = self.study.note_array(runs)
        submitted = submit.submit_array(
            list(requests.values()), at_once=len(runs), name=name, between=self.database.beat
        )
        for one in submitted:
            self.say(f"{one.run_dir.name}: submitted as job {', '.join(one.jobs)}")
        return True

    def _later(self, rows: dict[str, RunRow], why: str) -> dict[str, RunRow]:
        for name in rows:
            self.later(name, why)
        self.database.write(list(rows.values()))
        return rows


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
