"""More cells where the optimum lies at the edge of its grid, or is too flat to call: the next round of a study.

A grid is widened by one value, in the ratio of its outermost two, at the end beyond which the optimum lies; at both
ends where it is flat, as the curvature shows better the wider the grid. All horizons of the model get the value: under
wsd they share the stem that costs most, and a grid with holes would move the optima of the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tools.scaling.cells import Cell, Placed, cells, place, shapes
from tools.scaling.fit import Fit
from tools.scaling.ladder import Shape
from tools.scaling.optimum import EDGE_HIGH, EDGE_LOW, FLAT, Optimum
from tools.scaling.plan import Dropped, Plan
from tools.scaling.plan_file import PlanFile
from tools.scaling.study import StudyFile, parse_study

# In ln N: points of one model have its size.
_SAME_SIZE = 1e-3
# A setting so many times the best that anybody asked for is not worth a run.
_FARTHEST = 64.0


@dataclass
class _Grid:
    """What one model was tried with, and is to be tried with."""

    shape: Shape
    rates: list[float]
    batches: list[float]
    horizons: set[int]
    new_rates: list[float] = field(default_factory=list)
    new_batches: list[float] = field(default_factory=list)
    why: list[str] = field(default_factory=list)


def next_round(plan: PlanFile, fit: Fit) -> Plan | None:
    """The cells that the flags of a fit ask for, within what is left of the budget; None where they ask for none.

    Args:
        plan: with all rounds so far.
        fit: of all its cells.
    """
    study = parse_study(plan.path, plan.content["study"])
    length = study.base.data.seq_length
    kept: list[Cell] = []
    placed: list[Placed] = []
    late: list[Dropped] = []
    reasons: list[str] = []
    left = math.inf if study.budget_hours is None else study.budget_hours - float(plan.content["device_hours"])
    for shape in shapes(study):
        grid = _grid(plan, shape, length)
        if grid is None:
            continue
        _widen(grid, _of_model(fit, shape), study)
        if not grid.why:
            continue
        there, found = _cells(study, grid)
        cost = Plan(study, there, found, [], []).device_hours
        if not found:
            continue
        if cost > left:
            reason = f"{'; '.join(grid.why)}, but {max(0.0, left):.3g} device-hours of the budget are left"
            late.append(Dropped(f"{shape.name}, a wider grid", len(found), cost, reason))
            continue
        left -= cost
        placed += there
        kept += found
        reasons += [f"{shape.name}: {why}" for why in grid.why]
    return Plan(study, placed, kept, late, reasons) if kept or late else None


def _grid(plan: PlanFile, shape: Shape, length: int) -> _Grid | None:
    mine = [cell for cell in plan.content["cells"] if cell["model"] == shape.name]
    if not mine:
        return None
    rates = sorted({float(cell["learning_rate"]) for cell in mine})
    batches = sorted({float(cell["sequences"] * length) for cell in mine})
    return _Grid(shape, rates, batches, {int(str(cell["name"]).rpartition("_t")[2]) for cell in mine})


def _of_model(fit: Fit, shape: Shape) -> list[Optimum]:
    def same(group: int) -> bool:
        params, sparsity = fit.points.params[group], fit.points.sparsity[group]
        return bool(
            abs(math.log(params / shape.params)) < _SAME_SIZE
            and abs(math.log(sparsity * shape.params / shape.total)) < _SAME_SIZE
        )

    return [one for one in fit.optima if same(one.group)]


def _widen(grid: _Grid, optima: Sequence[Optimum], study: StudyFile) -> None:
    for variable, values, new, asked in (
        ("learning_rate", grid.rates, grid.new_rates, study.learning_rates),
        ("batch_tokens", grid.batches, grid.new_batches, study.batches),
    ):
        flags = {flag for one in optima if one.variable == variable for flag in one.flags}
        if len(values) < 2 or not flags & {EDGE_LOW, EDGE_HIGH, FLAT}:
            continue
        below, above = values[0] ** 2 / values[1], values[-1] ** 2 / values[-2]
        name = variable.replace("_", " ")
        if flags & {EDGE_LOW, FLAT} and below > min(asked) / _FARTHEST:
            new.append(below)
            grid.why.append(f"best {name} {'at the lower end' if EDGE_LOW in flags else 'too flat to call'}")
        if flags & {EDGE_HIGH, FLAT} and above < max(asked) * _FARTHEST:
            new.append(above)
            grid.why.append(f"best {name} {'at the upper end' if EDGE_HIGH in flags else 'too flat to call'}")


def _cells(study: StudyFile, grid: _Grid) -> tuple[list[Placed], list[Cell]]:
    """New rates with every batch that was there; every rate with the new batches."""
    found: list[Cell] = []
    there: list[Placed] = []
    old = {round(batch / study.base.data.seq_length) for batch in grid.batches}
    for batches, rates in ((grid.batches, grid.new_rates), (grid.new_batches, [*grid.rates, *grid.new_rates])):
        fits = [one for batch in batches if (one := place(study, grid.shape, batch)).why_not is None]
        if batches is grid.new_batches:  # devices may share no batch between two that were tried
            fits = [one for one in fits if one.sequences not in old]
        if rates and fits:
            more = cells(replace(study, learning_rates=tuple(rates)), fits)
            found += [cell for cell in more if cell.horizon in grid.horizons]
            there += fits
    return there, found
