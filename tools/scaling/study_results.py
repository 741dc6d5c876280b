"""What a study has shown: the one thing that passes from running a study to fitting and reporting it.

``launch.sweeps.results`` makes it from a study's plan and run directories, or from a CSV. What fits and draws reads
nothing else, so that it does not know how a study was run, and a CSV of anybody's models is as good as a study.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.scaling.observations import Observation


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
class StudyResults:
    """Observations, and what only a study knows about them.

    Args:
        title: name of the study or of the CSV.
        observations: all cells.
        notes: what the losses are.
        reasons: why a cell diverged or failed, by name.
        runs: the directory in which a cell's run directory has the cell's name; None for a CSV.
        spent: device-hours by model; empty for a CSV.
        budget_hours: of the study; None without one.
        dropped: what the plan left out.
        scores: a score of finished cells by name, where one was asked for.
        device: what the cells computed on; empty for a CSV.
    """

    title: str
    observations: Sequence[Observation]
    notes: Sequence[str] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    runs: Path | None = None
    spent: Sequence[Spent] = ()
    budget_hours: float | None = None
    dropped: Sequence[dict[str, Any]] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
