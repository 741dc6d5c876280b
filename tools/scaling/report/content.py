"""What a report shows, gathered from a fit, its observations, and the plan and the runs of a study."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.rundir import RunDirectory
from tools.run_records import read_lines
from tools.scaling.fit import Fit
from tools.scaling.observations import Observation
from tools.scaling.plan_file import PlanFile


@dataclass(frozen=True)
class Spent:
    """Device-hours of one model.

    Args:
        model: its name.
        runs: stems and cells.
        planned: what the plan says.
        spent: from the first to the last second of every attempt, times its devices.
    """

    model: str
    runs: int
    planned: float
    spent: float


@dataclass(frozen=True)
class Content:
    """Everything that is on the page.

    Args:
        title: name of the study or of the CSV.
        observations: all cells.
        fit: what they say; None where there is nothing to fit.
        document: the same as its file has it; empty without one.
        notes: what a reader must know.
        reasons: why a cell diverged or failed, by name.
        links: where the run of a cell lies, from the page, by name.
        spent: device-hours by model; empty for a CSV.
        budget_hours: of the study; None without one.
        dropped: what the plan left out.
        device: what the cells computed on; empty for a CSV.
    """

    title: str
    observations: Sequence[Observation]
    fit: Fit | None
    document: dict[str, Any]
    notes: Sequence[str]
    reasons: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    spent: Sequence[Spent] = ()
    budget_hours: float | None = None
    dropped: Sequence[dict[str, Any]] = ()
    device: str = ""

    @property
    def embeddings(self) -> bool:
        """Whether N counts embeddings, here as in the fit."""
        return self.fit is not None and self.fit.settings.embeddings


def counted(one: Observation, *, embeddings: bool) -> float:
    """N of a cell as the fit counts it."""
    return one.params + (one.embedding_params or 0.0 if embeddings else 0.0)


def of_a_study(content: Content, plan: PlanFile, runs: Path, links: dict[str, str]) -> Content:
    """Adds what only a study knows: its name, budget, device, and what it dropped."""
    planned = plan.content
    device = f"{planned.get('devices', 1)} x {planned['device']}" if "device" in planned else ""
    return replace(
        content,
        title=str(planned["name"]),
        links=links,
        spent=spent(plan, runs),
        budget_hours=planned.get("budget_hours"),
        dropped=planned.get("dropped") or (),
        device=device,
    )


def spent(plan: PlanFile, runs: Path) -> list[Spent]:
    """Device-hours by model, small models first."""
    content = plan.content
    model_of = {str(cell["name"]): str(cell["model"]) for cell in content["cells"]}
    model_of |= {str(cell["stem"]): str(cell["model"]) for cell in content["cells"] if "stem" in cell}
    found: dict[str, list[tuple[float, float]]] = {str(model["name"]): [] for model in content["models"]}
    for run in (*content["stems"], *content["cells"]):
        name = str(run["name"])
        found[model_of[name]].append((float(run.get("device_hours") or 0.0), device_hours(runs / name)))
    return [
        Spent(model, len(each), sum(planned for planned, _ in each), sum(used for _, used in each))
        for model, each in found.items()
        if each
    ]


def device_hours(run_dir: Path) -> float:
    """Of all attempts at a run; one whose end nobody noted counts its steps."""
    directory = RunDirectory(run_dir)
    total = 0.0
    for attempt in AttemptLog(directory.attempts).read():
        seconds = attempt.wall_s
        if seconds is None:
            records = (one for one in read_lines(directory.metrics) if one.get("attempt") == attempt.number)
            seconds = sum(float(one.get("step_time_s") or 0.0) for one in records)
        total += seconds * (attempt.world_size or 1)
    return total / 3600


def links(observations: Sequence[Observation], runs: Path, page: Path) -> dict[str, str]:
    """Paths of the run directories that exist, or of their own page, as the page names them."""
    found = {}
    for one in observations:
        directory = runs / one.name
        if one.name and directory.is_dir():
            there = directory / "report.html"
            target = there if there.is_file() else directory
            found[one.name] = quote(os.path.relpath(target, page.absolute().parent))
    return found
