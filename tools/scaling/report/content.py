"""What a report shows, gathered from the results of a study and their fit."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tools.scaling.fit import Fit
from tools.scaling.observations import Observation
from tools.scaling.study_results import StudyResults


@dataclass(frozen=True)
class Content:
    """Everything that is on the page.

    Args:
        results: of the study or the CSV.
        fit: what they say; None where there is nothing to fit.
        document: the same as its file has it; empty without one.
        notes: what a reader must know.
        links: where the run of a cell lies, from the page, by name.
    """

    results: StudyResults
    fit: Fit | None
    document: dict[str, Any]
    notes: Sequence[str]
    links: dict[str, str] = field(default_factory=dict)

    @property
    def embeddings(self) -> bool:
        """Whether N counts embeddings, here as in the fit."""
        return self.fit is not None and self.fit.settings.embeddings


def counted(one: Observation, *, embeddings: bool) -> float:
    """N of a cell as the fit counts it."""
    return one.params + (one.embedding_params or 0.0 if embeddings else 0.0)


def links(results: StudyResults, page: Path) -> dict[str, str]:
    """Paths of the run directories that exist, or of their own page, as the page names them."""
    found: dict[str, str] = {}
    if results.runs is None:
        return found
    for one in results.observations:
        directory = results.runs / one.name
        if one.name and directory.is_dir():
            there = directory / "report.html"
            target = there if there.is_file() else directory
            found[one.name] = quote(os.path.relpath(target, page.absolute().parent))
    return found
