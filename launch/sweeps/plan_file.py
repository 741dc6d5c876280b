"""A plan read back."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.sweeps.plan import FORMAT
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.errors import ConfigError, Problem

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

_WHOLE = ("sequences", "params", "total_params", "embedding_params", "seed", "iterations", "warmup", "tokens", "from")
_NUMBERS = ("learning_rate", "min_learning_rate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
    if problems := list(_problems(str(path), content)):
        raise ConfigError(problems)
    return PlanFile(path, content)


def merged(plan: PlanFile, rounds: Sequence[PlanFile]) -> PlanFile:
    """A plan with what later rounds added to it."""
    if not rounds:
        return plan
    content = dict(plan.content)
    for one in rounds:
        known = {(model["name"], model["sequences"]) for model in content["models"]}
        fresh = [model for model in one.content["models"] if (model["name"], model["sequences"]) not in known]
        content["models"] = [*content["models"], *fresh]
        for part in ("stems", "cells", "dropped", "warnings"):
            content[part] = [*(content.get(part) or ()), *(one.content.get(part) or ())]
        content["device_hours"] = float(content.get("device_hours") or 0) + float(one.content.get("device_hours") or 0)
    if problems := list(_problems(str(rounds[-1].path), content)):
        raise ConfigError(problems)
    return PlanFile(plan.path, content)


def _problems(where: str, content: dict[str, Any]) -> Iterator[Problem]:
    for name in ("name", "recipe"):
        if not isinstance(content.get(name), str):
            yield Problem(f"{where}: {name}", content.get(name), "must be text.")
    if not _NAME.fullmatch(str(content.get("name"))):
        yield Problem(f"{where}: name", content.get("name"), "must be letters, digits, '.', '_' and '-'.")
    rounds, budget = content.get("adaptive_rounds", 0), content.get("budget_hours")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
        yield Problem(f"{where}: adaptive_rounds", rounds, "must be a whole number of at least 0.")
    elif rounds and not isinstance(content.get("study"), dict):
        yield Problem(f"{where}: study", None, "is missing: an adaptive study is widened from it.")
    if budget is not None and (not isinstance(budget, int | float) or isinstance(budget, bool)):
        yield Problem(f"{where}: budget_hours", budget, "must be a number.")
    wrong = False
    for part, fields in _NEEDED.items():
        rows = content.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            wrong = True
            yield Problem(f"{where}: {part}", None, "must be a list of mappings.")
            continue
        for number, row in enumerate(rows):
            for one in _row_problems(f"{where}: {part}[{number}]", row, fields):
                wrong = True
                yield one
    if not wrong:
        yield from _references(where, content)


def _row_problems(where: str, row: dict[str, Any], fields: Sequence[str]) -> Iterator[Problem]:
    if "stem" in row:
        fields = (*fields, "from")
    if missing := [name for name in fields if name not in row]:
        yield Problem(where, None, f"lacks {', '.join(missing)}.")
        return
    for name in fields:
        value = row[name]
        if name == "name" and not _NAME.fullmatch(str(value)):
            yield Problem(f"{where}.name", value, "must be letters, digits, '.', '_' and '-', at most 100.")
        elif name in _WHOLE and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            yield Problem(f"{where}.{name}", value, "must be a whole number of at least 0.")
        elif name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield Problem(f"{where}.{name}", value, "must be a number.")
        elif name == "overrides" and not isinstance(value, dict):
            yield Problem(f"{where}.{name}", None, "must be a mapping.")
        elif name == "save_at" and not (isinstance(value, list) and all(isinstance(one, int) for one in value)):
            yield Problem(f"{where}.{name}", value, "must be a list of iterations.")


def _references(where: str, content: dict[str, Any]) -> Iterator[Problem]:
    models = {(one["name"], one["sequences"]) for one in content["models"]}
    stems = {str(stem["name"]) for stem in content["stems"]}
    names = [str(one["name"]) for one in (*content["stems"], *content["cells"])]
    for name in sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        yield Problem(f"{where}: name", name, "is the name of several runs.")
    for number, cell in enumerate(content["cells"]):
        if (cell["model"], cell["sequences"]) not in models:
            yield Problem(f"{where}: cells[{number}].model", cell["model"], "is none of its models.")
        if "stem" in cell and str(cell["stem"]) not in stems:
            yield Problem(f"{where}: cells[{number}].stem", cell["stem"], "is none of its stems.")
    for lonely in sorted(stems - {str(cell.get("stem")) for cell in content["cells"]}):
        yield Problem(f"{where}: stems", lonely, "has no cell that branches off it.")
