"""A plan read back, and the observations in the runs it names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.errors import ConfigError, Problem
from tools.scaling.observations import DONE, Observation
from tools.scaling.outcome import Outcome, outcome
from tools.scaling.plan import FORMAT

_NEEDED = {
    "models": ("name", "sequences", "params", "total_params", "embedding_params", "overrides"),
    "cells": (
        "name",
        "model",
        "learning_rate",
        "min_learning_rate",
        "sequences",
        "seed",
        "iterations",
        "warmup",
        "tokens",
    ),
    "stems": ("name", "iterations", "save_at"),
}


@dataclass(frozen=True)
class PlanFile:
    """What ``mq sweep plan`` wrote, as read.

    Args:
        path: the file.
        content: its mapping, with all that ``_NEEDED`` names.
    """

    path: Path
    content: dict[str, Any]

    def model(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The model of a cell."""
        models: list[dict[str, Any]] = self.content["models"]
        return next(one for one in models if (one["name"], one["sequences"]) == (cell["model"], cell["sequences"]))


def read_plan(path: Path) -> PlanFile:
    """Reads a plan.

    Raises:
        ConfigError: it is none, or lacks what a run needs.
    """
    content = read_mapping(path)
    if content.get("format") != FORMAT:
        raise ConfigError(Problem(str(path), content.get("format"), "is no plan that mq sweep plan has written."))
    problems = []
    for part, fields in _NEEDED.items():
        rows = content.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            problems.append(Problem(f"{path}: {part}", None, "must be a list of mappings."))
            continue
        for number, row in enumerate(rows):
            if missing := [name for name in fields if name not in row]:
                problems.append(Problem(f"{path}: {part}[{number}]", None, f"lacks {', '.join(missing)}."))
    if not problems:
        known = {(one["name"], one["sequences"]) for one in content["models"]}
        for number, cell in enumerate(content["cells"]):
            if (cell["model"], cell["sequences"]) not in known:
                problems.append(Problem(f"{path}: cells[{number}].model", cell["model"], "is none of its models."))
    if problems:
        raise ConfigError(problems)
    return PlanFile(path, content)


def observe(plan: PlanFile, runs: Path) -> tuple[list[Observation], dict[str, Outcome]]:
    """Every cell of a plan as an observation, and how its run stands.

    Args:
        plan: the plan.
        runs: where the run directories lie, by the names of the cells.
    """
    observations, outcomes = [], {}
    for cell in plan.content["cells"]:
        model = plan.model(cell)
        found = outcome(runs / str(cell["name"]), iterations=int(cell["iterations"]))
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


def measured(outcomes: dict[str, Outcome]) -> str:
    """What the losses of the done cells are, or that they are not the same."""
    kinds = {one.measured for one in outcomes.values() if one.status == DONE}
    return next(iter(kinds)) if len(kinds) == 1 else "validation of some, training of others" if kinds else ""
