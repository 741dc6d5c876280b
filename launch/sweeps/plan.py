"""The plan of a study: all cells with their cost, those that the budget allows, and the file that people review."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.sweeps.cells import Cell, Placed, Stem, cells, place, shapes, stems
from launch.sweeps.study import StudyFile
from megatron_qwen.config.render import difference
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import atomic_write

FORMAT = 1
# Fewer distinct values do not show a minimum.
_FEWEST_RATES = 4


@dataclass(frozen=True)
class DroppedCells:
    """What the study names and the plan does not hold.

    Args:
        what: model and horizon.
        cells: how many.
        device_hours: what they would cost; None where they cannot run.
        reason: why.
    """

    what: str
    cells: int
    device_hours: float | None
    reason: str


@dataclass(frozen=True)
class StudyPlan:
    """A study, expanded.

    Args:
        study: as read.
        placed: models and batches.
        cells: that are to run, small compute first.
        dropped: what is left out.
        warnings: what the study will not show.
    """

    study: StudyFile
    placed: list[Placed]
    cells: list[Cell]
    dropped: list[DroppedCells]
    warnings: list[str]

    @property
    def stems(self) -> list[Stem]:
        """Runs that cells branch off."""
        return stems(self.cells)

    def hours(self, run: Cell | Stem) -> float:
        """Device-hours of a run itself."""
        cell = run.branches[0] if isinstance(run, Stem) else run
        tokens = run.tokens if isinstance(run, Stem) else run.own_tokens
        return tokens / cell.placed.tokens_per_second * self.study.device.count / 3600

    @property
    def device_hours(self) -> float:
        """Of all runs."""
        return sum(map(self.hours, self.cells)) + sum(map(self.hours, self.stems))


def make_plan(study: StudyFile) -> StudyPlan:
    """Expands a study and fits it into its budget.

    Whole horizons of whole models are taken or dropped, by their compute: a grid with holes would move the optima that
    it is to find.

    Raises:
        ConfigError: nothing of it can run.
    """
    placed = [place(study, shape, batch) for shape in shapes(study) for batch in study.batches]
    everything = sorted(cells(study, placed), key=lambda cell: (cell.placed.shape.params * cell.tokens, cell.name))
    dropped = [
        DroppedCells(f"{one.shape.name}, {one.sequences} sequences per step", _of(study), None, one.why_not)
        for one in placed
        if one.why_not is not None
    ]
    names = [cell.name for cell in everything]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        fix = "names two cells with nearly equal learning rates or batches; space them further apart."
        raise ConfigError([Problem("study", name, fix) for name in twice[:5]])
    kept, late = _within_budget(study, everything)
    if not kept:
        reasons = "; ".join(f"{one.what}: {one.reason}" for one in (*dropped, *late)[:5])
        raise ConfigError(Problem("study", study.name, f"has no cell that can run: {reasons}"))
    return StudyPlan(study, placed, kept, [*dropped, *late], _warnings(study, placed, kept))


def _of(study: StudyFile) -> int:
    """Cells of one model and batch."""
    horizons = len(study.tokens or study.tokens_per_param)
    return horizons * len(study.learning_rates) * len(study.seeds)


def _within_budget(study: StudyFile, everything: list[Cell]) -> tuple[list[Cell], list[DroppedCells]]:
    """Horizons of models in order of compute until one does not fit; and those from there on."""
    blocks: dict[tuple[str, int], list[Cell]] = {}
    for cell in everything:
        blocks.setdefault((cell.placed.shape.name, cell.horizon), []).append(cell)
    ordered = sorted(blocks.items(), key=lambda item: max(c.placed.shape.params * c.tokens for c in item[1]))
    kept: list[Cell] = []
    late: list[DroppedCells] = []
    spent, full = 0.0, False
    for (shape, _), block in ordered:
        before = {cell.stem: cell.branch_point for cell in kept if cell.stem is not None}
        tokens = {cell.name: cell.own_tokens + _stem_tokens(cell, before) for cell in block}
        cost = sum(tokens[c.name] / c.placed.tokens_per_second for c in block) * study.device.count / 3600
        full = full or (study.budget_hours is not None and spent + cost > study.budget_hours)
        if full:
            reason = f"the budget of {study.budget_hours:g} device-hours is used up before it"
            late.append(DroppedCells(f"{shape}, {block[0].tokens:.3g} tokens", len(block), cost, reason))
        else:
            spent += cost
            kept += block
    return kept, late


def _stem_tokens(cell: Cell, before: dict[str, int]) -> int:
    """What the stem must train on for this branch beyond what shorter ones need."""
    if cell.stem is None:
        return 0
    return max(0, cell.branch_point - before.get(cell.stem, 0)) * cell.step_tokens


def _warnings(study: StudyFile, placed: list[Placed], kept: list[Cell]) -> list[str]:
    found = []
    sizes = {cell.placed.shape.name for cell in kept}
    horizons = {cell.tokens for cell in kept}
    if len(sizes) < 3 or len(horizons) < 3:
        found.append(f"{len(sizes)} sizes and {len(horizons)} horizons: the law of the loss requires three of each")
    if len(study.learning_rates) < _FEWEST_RATES:
        found.append(f"{len(study.learning_rates)} learning rates cannot show a minimum; give at least {_FEWEST_RATES}")
    short = [cell for cell in kept if cell.iterations < 100]
    if short:
        found.append(
            f"{len(short)} cells have fewer than 100 steps ({short[0].name}: {short[0].iterations}): lower batch_tokens"
        )
    for one in placed:
        for batch in study.batches:
            wanted = batch / one.config.data.seq_length
            if abs(one.sequences / wanted - 1) > 0.2 and abs(one.sequences - wanted) == min(
                abs(other.sequences - wanted) for other in placed
            ):
                found.append(f"a batch of {batch:g} tokens becomes {one.sequences} sequences, which the devices share")
    return sorted(set(found))


def document(plan: StudyPlan) -> dict[str, Any]:
    """The plan as JSON and YAML hold it."""
    study = plan.study
    return {
        "format": FORMAT,
        "name": study.name,
        "recipe": study.recipe,
        "overrides": list(study.overrides),
        "schedule": study.schedule,
        "devices": study.device.count,
        "device": study.device.kind.name if study.device.kind else f"{study.device.tflops:g} TFLOP/s measured",
        "device_hours": _short(plan.device_hours),
        "budget_hours": study.budget_hours,
        "models": [_model(plan, one) for one in plan.placed],
        "stems": [_stem(plan, stem) for stem in plan.stems],
        "cells": [_cell(plan, cell) for cell in plan.cells],
        "dropped": [
            {"what": one.what, "cells": one.cells, "device_hours": _short(one.device_hours), "reason": one.reason}
            for one in plan.dropped
        ],
        "warnings": plan.warnings,
        "adaptive_rounds": study.adaptive_rounds,
        "study": study.content,
    }


def _model(plan: StudyPlan, one: Placed) -> dict[str, Any]:
    shape = one.shape
    changes = difference(one.config, plan.study.base)
    return {
        "name": shape.name,
        "sequences": one.sequences,
        "params": shape.params,
        "total_params": shape.total,
        "embedding_params": shape.embedding,
        **({"granularity": shape.granularity} if shape.granularity else {}),
        "memory_gib": _short(one.memory_gib),
        "tokens_per_second": _short(one.tokens_per_second),
        "overrides": {f"{section}.{name}": value for section, body in changes.items() for name, value in body.items()},
    }


def _stem(plan: StudyPlan, stem: Stem) -> dict[str, Any]:
    return {
        "name": stem.name,
        "iterations": stem.iterations,
        "save_at": sorted({cell.branch_point for cell in stem.branches}),
        "device_hours": _short(plan.hours(stem)),
    }


def _cell(plan: StudyPlan, cell: Cell) -> dict[str, Any]:
    shape = cell.placed.shape
    return {
        "name": cell.name,
        "model": shape.name,
        "learning_rate": _short(cell.learning_rate),
        "min_learning_rate": _short(cell.config().optim.min_learning_rate),
        "sequences": cell.placed.sequences,
        "seed": cell.seed,
        "iterations": cell.iterations,
        "warmup": cell.warmup,
        **({"stem": cell.stem, "from": cell.branch_point} if cell.stem is not None else {}),
        "tokens": cell.tokens,
        "flops": _short(6.0 * shape.params * cell.tokens),
        "device_hours": _short(plan.hours(cell)),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


class _Flow(dict[str, Any]):
    """A mapping that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes the plan, a line for each run."""
    lined = {
        name: [_Flow(row) for row in value] if name in ("stems", "cells", "dropped") else value
        for name, value in content.items()
    }
    text = yaml.dump(lined, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    head = "# What a study will run. Read it, then submit it; `mq sweep plan` recreates it from the study.\n"
    atomic_write(path, head + text)


def table(content: dict[str, Any]) -> str:
    """The plan for a terminal."""
    budget = f" of {content['budget_hours']:g}" if content["budget_hours"] is not None else ""
    runs = len(content["cells"])
    lines = [
        f"{content['name']}: {runs} cells, {len(content['stems'])} stems, {content['device_hours']:.4g}{budget} "
        f"device-hours on {content['devices']} x {content['device']}",
        f"{'model':<22}{'N':>10}{'all':>10}{'embedding':>11}{'batch':>7}{'GiB':>8}{'tokens/s':>12}{'cells':>7}"
        f"{'D':>22}{'hours':>9}",
    ]
    for model in content["models"]:
        mine = [c for c in content["cells"] if c["model"] == model["name"] and c["sequences"] == model["sequences"]]
        tokens = sorted({cell["tokens"] for cell in mine})
        spread = f"{tokens[0]:.3g} to {tokens[-1]:.3g}" if tokens else "-"
        prefix = f"{model['name']}_b{model['sequences']}_"
        hours = sum(c["device_hours"] for c in mine)
        hours += sum(stem["device_hours"] for stem in content["stems"] if stem["name"].startswith(prefix))
        lines.append(
            f"{model['name']:<22}{model['params']:>10.3g}{model['total_params']:>10.3g}{model['embedding_params']:>11.3g}"
            f"{model['sequences']:>7}{model['memory_gib']:>8.2f}{model['tokens_per_second']:>12,.0f}{len(mine):>7}{spread:>22}"
            f"{hours:>9.3g}"
        )
    for one in content["dropped"]:
        cost = "" if one["device_hours"] is None else f", {one['device_hours']:.3g} device-hours"
        lines.append(f"dropped: {one['what']} ({one['cells']} cells{cost}): {one['reason']}")
    lines += [f"warning: {warning}" for warning in content["warnings"]]
    if rounds := content["adaptive_rounds"]:
        lines.append(f"up to {rounds} more rounds where an optimum is at the edge of its grid or is flat")
    return "\n".join(lines)
