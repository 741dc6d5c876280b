"""A plan read back, and the observations in the runs it names."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_qwen.config.fields import Bounds, Form
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import ConfigError, Problem
from tools.scaling.observations import DONE, Observation
from tools.scaling.outcome import Outcome, outcome
from tools.scaling.plan import FORMAT

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _name(value: object) -> str:
    if not _NAME.fullmatch(str(value)):
        raise ValueError
    return str(value)


_Name = Annotated[str, Form("letters, digits, '.', '_' and '-', at most 100, the first a letter or digit", _name)]
_Whole = Annotated[int, Bounds(minimum=0)]


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What a run needs to know of its model."""

    name: _Name
    sequences: _Whole
    params: _Whole
    total_params: _Whole
    embedding_params: _Whole
    overrides: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """What a run needs to know of itself; one with a stem has a ``from`` as well, its first iteration."""

    name: _Name
    model: str
    learning_rate: float
    min_learning_rate: float
    sequences: _Whole
    seed: _Whole
    iterations: _Whole
    warmup: _Whole
    tokens: _Whole
    stem: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Stem:
    name: _Name
    iterations: _Whole
    save_at: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is read of a plan; all else in it is for people, and for the report."""

    name: _Name
    recipe: str
    models: tuple[_Model, ...]
    cells: tuple[_Cell, ...]
    stems: tuple[_Stem, ...]
    adaptive_rounds: _Whole = 0
    budget_hours: float | None = None
    study: dict[str, Any] | None = None


@dataclass(frozen=True)
class PlanFile:
    """What ``mq sweep plan`` wrote, as read.

    Args:
        path: the file.
        content: its mapping, with all that ``_Plan`` names.
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
    _require_right(path, content)
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
    _require_right(rounds[-1].path, content)
    return PlanFile(plan.path, content)


def _require_right(path: Path, content: dict[str, Any]) -> None:
    reader = YamlReader(str(path), extra_fields=True)
    plan = reader.read(_Plan, content)
    for number, row in enumerate(content["cells"] if plan is not None else ()):
        if "stem" in row and "from" not in row:
            reader.wrong(f"cells[{number}].from", None, "must be given with a stem.")
        elif "stem" in row:
            reader.value(_Whole, row["from"], f"cells[{number}].from")
    if plan is not None:
        if plan.adaptive_rounds and plan.study is None:
            reader.wrong("study", None, "is missing: an adaptive study is widened from it.")
        _check_references(reader, plan)
    reader.require_right()


def _check_references(reader: YamlReader, plan: _Plan) -> None:
    models = {(one.name, one.sequences) for one in plan.models}
    stems = {stem.name for stem in plan.stems}
    names = Counter([*(stem.name for stem in plan.stems), *(cell.name for cell in plan.cells)])
    for name in sorted(name for name, count in names.items() if count > 1):
        reader.wrong("name", name, "is the name of several runs.")
    for number, cell in enumerate(plan.cells):
        if (cell.model, cell.sequences) not in models:
            reader.wrong(f"cells[{number}].model", cell.model, "is none of its models.")
        if cell.stem is not None and cell.stem not in stems:
            reader.wrong(f"cells[{number}].stem", cell.stem, "is none of its stems.")
    for lonely in sorted(stems - {cell.stem for cell in plan.cells}):
        reader.wrong("stems", lonely, "has no cell that branches off it.")


def observe(plan: PlanFile, runs: Path) -> tuple[list[Observation], dict[str, Outcome]]:
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


def measured(outcomes: dict[str, Outcome]) -> str:
    """What the losses of the done cells are, or that they are not the same."""
    kinds = {one.measured for one in outcomes.values() if one.status == DONE}
    return next(iter(kinds)) if len(kinds) == 1 else "validation of some, training of others" if kinds else ""
