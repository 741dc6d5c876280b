"""Submits runs of a study to the scheduler: one job per run on a machine, on Slurm one array per model shape.

The order of writes makes a kill harmless. The database records a run as active, and the study directory the members of
an array, before anything is submitted. A controller that is killed in between leaves runs that look active; the next
one (look.py) asks the scheduler for jobs of these names and finds out which exist."""

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
        at_once: runs that may be pending or running at once; None is the scheduler's default.
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
        database: written before a job is submitted, so that the next controller finds the job by its name.
        say: called with a line for everything that changes.
        later: called with a run and the reason why it is not submitted yet.
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
        # Smaller after Slurm has refused an array: sites limit the size of arrays and the jobs of a user. It doubles
        # again after each array that Slurm accepts.
        self._limit = self._most = min(self.at_once, self._largest_array())

    def _largest_array(self) -> int:
        try:
            largest = slurm.largest_array() if self.as_arrays else None
        except slurm.SlurmError:  # it does not answer now; it will refuse what is too large
            largest = None
        if largest is None:
            return self.at_once
        return max(1, largest)  # a group of one is a job without an array, which MaxArraySize=0 allows too

    def groups(self, runs: Sequence[StudyRun]) -> list[list[StudyRun]]:
        """Runs that are submitted together, in the order of their first."""
        if not self.as_arrays:
            return [[run] for run in runs]
        order = {shape: place for place, shape in enumerate(dict.fromkeys((run.kind, run.shape) for run in runs))}
        ordered = sorted(runs, key=lambda run: order[run.kind, run.shape])
        found = [list(members) for _, members in groupby(ordered, key=lambda run: (run.kind, run.shape))]
        return [part for group in found for part in map(list, batched(group, self._most))]

    def __call__(self, runs: Sequence[StudyRun], rows: dict[str, RunRow]) -> list[RunRow]:
        """Submits a group. An error of a run makes that run fail; an error of the cluster is retried later.

        Args:
            runs: of one group.
            rows: their states before.

        Returns:
            Their states now.
        """
        found: dict[str, RunRow] = {}
        requests: dict[str, SubmitRequest] = {}
        for run in runs:
            self.database.beat()
            row = rows[run.name]
            if outcome(self.study.runs / run.name, iterations=run.iterations).status != UNFINISHED:
                found[run.name] = row  # it has ended meanwhile: look.py reads the result in the next iteration
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
        """The request, or the reason why the run cannot be submitted; an empty text where it may be possible later."""
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
            # A timeout does not tell whether Slurm took the jobs. The rows go back to their state before; if jobs
            # exist, look.py finds them by name. Slurm may have refused the size of the array: halve the next one.
            self._most = max(1, len(runs) // 2)
            return self._later(before, _line(error))
        except UserError as error:
            if len(runs) > 1:  # submitted one by one, each run gets its own error
                return {name: row for run in runs for name, row in self._submit([run], before, requests).items()}
            if any(problem.where == "run" for problem in error.problems):  # another command is submitting or running it
                return self._later(before, _line(error))
            return {name: replace(row, status=FAILED, why=_line(error)[:500]) for name, row in before.items()}
        self._most = min(self._limit, 2 * self._most)
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
