"""The cells of a plan as observations: every trained model with what became of its run."""

from dataclasses import replace
from pathlib import Path

from launch.sweeps.database import RunRow
from launch.sweeps.outcome import RunOutcome, outcome
from launch.sweeps.plan_file import PlanFile
from launch.sweeps.study_directory import StudyDirectory
from tools.scaling.observations import DIVERGED, DONE, FAILED, UNFINISHED, Observation


def observe(plan: PlanFile, runs: Path) -> tuple[list[Observation], dict[str, RunOutcome]]:
    """Every cell of a plan as an observation, and how its run stands.

    Args:
        plan: the plan.
        runs: where the run directories lie, by the names of the cells.
    """
    observations, outcomes = [], {}
    for cell in plan.content["cells"]:
        model = plan.model(cell)
        stem = runs / str(cell["stem"]) if "stem" in cell else None
        begins = int(cell.get("from", 0))
        found = outcome(runs / str(cell["name"]), iterations=int(cell["iterations"]), stem=stem, begins=begins)
        outcomes[str(cell["name"])] = found
        mixture = model["total_params"] != model["params"]
        observations.append(
            Observation(
                params=float(model["params"]),
                tokens=float(cell["tokens"]),
                loss=found.loss,
                status=found.status,
                learning_rate=float(cell["learning_rate"]),
                batch_tokens=float(cell["tokens"]) / float(cell["iterations"]),
                embedding_params=float(model["embedding_params"]),
                total_params=float(model["total_params"]) if mixture else None,
                granularity=float(model["granularity"]) if mixture and model.get("granularity") else None,
                name=str(cell["name"]),
            )
        )
    return observations, outcomes


def observed(
    plan: PlanFile, study: StudyDirectory, rows: dict[str, RunRow]
) -> tuple[list[Observation], dict[str, RunOutcome]]:
    """All cells; of those that never began, as their stem diverged or they were refused, the rows say so."""
    observations, outcomes = observe(plan, study.runs)
    never = {name: row.status for name, row in rows.items() if row.status in (DIVERGED, FAILED)}
    return [
        replace(one, status=never.get(one.name, one.status)) if one.status == UNFINISHED else one
        for one in observations
    ], outcomes


def measured(outcomes: dict[str, RunOutcome]) -> str:
    """What the losses of the done cells are, or that they are not the same."""
    kinds = {one.measured for one in outcomes.values() if one.status == DONE}
    return next(iter(kinds)) if len(kinds) == 1 else "validation of some, training of others" if kinds else ""
