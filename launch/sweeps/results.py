"""The results of a study, or of a CSV: read here, and handed to what fits and reports them."""

from collections.abc import Mapping
from pathlib import Path

from launch.sweeps.database import Database, RunRow
from launch.sweeps.fit_paths import beside
from launch.sweeps.look import look
from launch.sweeps.metric import shares_of_runs, with_metric
from launch.sweeps.observe import measured, observed
from launch.sweeps.spent import spent
from launch.sweeps.study_directory import StudyDirectory
from megatron_qwen.errors import ConfigError, Problem
from tools.scaling.doubts import doubts
from tools.scaling.observations import DONE, read_csv, write_csv
from tools.scaling.study_results import StudyResults


def read(
    source: Path, columns: Mapping[str, str] | None = None, *, metric: str | None = None, score: str | None = None
) -> StudyResults:
    """Reads a CSV, or the runs of a study, whose observations are also written next to its plan as a CSV.

    Args:
        source: the CSV or the directory of the study.
        columns: the CSV's names of columns, where they differ from those of an observation.
        metric: of the runs at their last step, in place of the loss; of a study.
        score: of the runs at their last step, besides; of a study.

    Raises:
        ConfigError: columns are named for a study.
    """
    if not source.is_dir():
        observations = read_csv(source, columns)
        return StudyResults(source.absolute().stem, observations, notes=list(doubts(observations)))
    if columns:
        typed = ",".join(f"{here}={there}" for here, there in columns.items())
        fix = f"names columns of a CSV, and {source} is a study, whose observations have none to name; leave it out."
        raise ConfigError(Problem("--columns", typed, fix))
    study = StudyDirectory(source)
    plan = study.plan()
    # Without the scheduler: whoever fits may sit at a machine that has none, and what is under way counts for nothing.
    rows = look(study, study.all_runs(plan), _noted(study), ask=False)
    observations, outcomes = observed(plan, study, rows)
    kind = measured(outcomes)
    if metric is not None:
        observations, kind = with_metric(observations, study.runs, metric), metric
    done = [one.name for one in observations if one.status == DONE]
    scores = {} if score is None else shares_of_runs(done, study.runs, score)
    write_csv(beside(study.path, "observations.csv", metric), observations)
    content = plan.content
    return StudyResults(
        title=str(content["name"]),
        observations=observations,
        notes=[f"losses are {kind}"] if kind else [],
        reasons={name: row.why for name, row in rows.items() if row.why},
        runs=study.runs,
        spent=spent(plan, study.runs),
        budget_hours=content.get("budget_hours"),
        scores=scores,
        dropped=content.get("dropped") or (),
        device=f"{content.get('devices', 1)} x {content['device']}" if "device" in content else "",
    )


def _noted(study: StudyDirectory) -> dict[str, RunRow]:
    """What the study's database says; nothing where there is none."""
    if not study.database.is_file():
        return {}
    database = Database(study.database)
    try:
        return database.rows()
    finally:
        database.close()
