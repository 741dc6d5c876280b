"""What there is to fit and to show: the runs of a study, or a CSV."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.sweeps.database import Database, Row
from launch.sweeps.look import look
from launch.sweeps.study_directory import StudyDirectory
from tools.scaling.observations import DIVERGED, FAILED, UNFINISHED, Observation, read_csv, write_csv
from tools.scaling.outcome import Outcome
from tools.scaling.plan_file import PlanFile, measured, observe


@dataclass(frozen=True)
class Results:
    """Observations, and where they come from.

    Args:
        observations: all cells.
        notes: what the losses are.
        reasons: why a cell diverged or failed, by name.
        study: None for a CSV.
        plan: of the study.
    """

    observations: list[Observation]
    notes: list[str]
    reasons: dict[str, str] = field(default_factory=dict)
    study: StudyDirectory | None = None
    plan: PlanFile | None = None


def read(source: Path) -> Results:
    """Reads a CSV, or the runs of a study, which are also written beside its plan as a CSV.

    Args:
        source: the CSV or the directory of the study.
    """
    if not source.is_dir():
        return Results(read_csv(source), [])
    study = StudyDirectory(source)
    plan = study.plan()
    rows = look(study, study.all_runs(plan), _noted(study), ask=False)
    observations, outcomes = observed(plan, study, rows)
    write_csv(study.path / "observations.csv", observations)
    kind = measured(outcomes)
    reasons = {name: row.why for name, row in rows.items() if row.why}
    return Results(observations, [f"losses are {kind}"] if kind else [], reasons, study, plan)


def observed(
    plan: PlanFile, study: StudyDirectory, rows: dict[str, Row]
) -> tuple[list[Observation], dict[str, Outcome]]:
    """All cells; of those that never began, as their stem diverged or they were refused, the rows say so."""
    observations, outcomes = observe(plan, study.runs)
    never = {name: row.status for name, row in rows.items() if row.status in (DIVERGED, FAILED)}
    return [
        replace(one, status=never.get(one.name, one.status)) if one.status == UNFINISHED else one
        for one in observations
    ], outcomes


def _noted(study: StudyDirectory) -> dict[str, Row]:
    """What the study's database says; nothing where there is none."""
    if not study.database.is_file():
        return {}
    database = Database(study.database)
    try:
        return database.rows()
    finally:
        database.close()
