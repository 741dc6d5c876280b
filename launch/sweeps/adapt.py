"""More cells where the optimum lies at the edge of its grid, or is too flat to locate: the next round of a study.

A grid is widened by one value, in the ratio of its outermost two, at the end beyond which the optimum lies; at both
ends where it is flat, as the curvature shows better the wider the grid, but not beyond what has diverged. All horizons
of the model get the value: under wsd they share the stem that costs most, and a grid with holes would move the optima
of the others.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from launch.sweeps.cells import Cell, Placed, cells, place, shapes
from launch.sweeps.plan import DroppedCells, StudyPlan
from launch.sweeps.plan_file import PlanFile
from launch.sweeps.study import StudyFile, parse_study
from tools.scaling.fit import SAME_HORIZON, Fit
from tools.scaling.ladder import ModelShape
from tools.scaling.observations import DIVERGED, DONE, Observation
from tools.scaling.optimum import EDGE_HIGH, EDGE_LOW, FLAT, Optimum

# In ln N: points of one model have its size.
_SAME_SIZE = 1e-3
# A grid grows to at most this multiple of the largest value that the study file asks for, and to its inverse below the
# smallest: six doublings. Beyond, the study asked for the wrong range. Chosen by hand.
_FARTHEST = 64.0


@dataclass
class _Grid:
    """What one model was tried with, and is to be tried with."""

    shape: ModelShape
    rates: list[float]
    batches: list[float]
    tokens: list[float]
    new_rates: list[float] = field(default_factory=list)
    new_batches: list[float] = field(default_factory=list)
    why: list[str] = field(default_factory=list)


def next_round(plan: PlanFile, observations: Sequence[Observation], fit: Fit) -> StudyPlan | None:
    """The cells that the flags of a fit ask for, within what is left of the budget; None where they ask for none.

    Args:
        plan: with all rounds so far.
        observations: of all its cells.
        fit: of them.
    """
    content = plan.content
    study = parse_study(plan.path, content["study"])
    names = {str(run["name"]) for run in (*content["stems"], *content["cells"])}
    budget = content.get("budget_hours")
    spent = sum(float(run.get("device_hours") or 0.0) for run in (*content["stems"], *content["cells"]))
    left = math.inf if budget is None else float(budget) - spent
    kept: list[Cell] = []
    placed: list[Placed] = []
    late: list[DroppedCells] = []
    reasons: list[str] = []
    for shape in shapes(study):
        grid = _grid(plan, shape, study.base.data.seq_length)
        if grid is None:
            continue
        mine = [one for one in observations if _is(shape, one)]
        _widen(grid, _of_model(fit, shape), mine, study)
        there, found, unfit = _cells(study, grid)
        late += unfit
        found = [cell for cell in found if cell.name not in names and cell.stem not in names]
        if not found:
            continue
        cost = StudyPlan(study, there, found, [], []).device_hours
        if cost > left:
            reason = f"{'; '.join(grid.why)}, but {max(0.0, left):.3g} device-hours of the budget remain"
            late.append(DroppedCells(f"{shape.name}, a wider grid", len(found), cost, reason))
            continue
        left -= cost
        placed += there
        kept += found
        reasons += [f"{shape.name}: {why}" for why in grid.why]
    return StudyPlan(study, placed, kept, late, reasons) if kept or late else None


def _grid(plan: PlanFile, shape: ModelShape, length: int) -> _Grid | None:
    mine = [cell for cell in plan.content["cells"] if cell["model"] == shape.name]
    if not mine:
        return None
    rates = sorted({float(cell["learning_rate"]) for cell in mine})
    batches = sorted({float(cell["sequences"] * length) for cell in mine})
    return _Grid(shape, rates, batches, sorted({float(cell["tokens"]) for cell in mine}))


def _is(shape: ModelShape, one: Observation) -> bool:
    return _same(shape, one.params, one.total_params or one.params, one.granularity)


def _same(shape: ModelShape, params: float, total: float, granularity: float | None) -> bool:
    pairs = ((params, shape.params), (total, shape.total), (granularity or 1.0, shape.granularity or 1.0))
    return all(abs(math.log(first / second)) < _SAME_SIZE for first, second in pairs)


def _of_model(fit: Fit, shape: ModelShape) -> list[Optimum]:
    points = fit.points
    return [
        one
        for one in fit.optima
        if _same(
            shape,
            float(points.params[one.group]),
            float(points.params[one.group] * points.sparsity[one.group]),
            float(points.granularity[one.group]),
        )
    ]


def _widen(grid: _Grid, optima: Sequence[Optimum], mine: Sequence[Observation], study: StudyFile) -> None:
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
            grid.why.append(f"best {name} {'at the lower end' if EDGE_LOW in flags else 'too flat to locate'}")
        if flags & {EDGE_HIGH, FLAT} and above < max(asked) * _FARTHEST and not _blows_up(mine, variable):
            new.append(above)
            grid.why.append(f"best {name} {'at the upper end' if EDGE_HIGH in flags else 'too flat to locate'}")


def _blows_up(mine: Sequence[Observation], variable: str) -> bool:
    """Whether a value larger than any that is done has diverged."""

    def values(status: str) -> Iterable[float]:
        return (value for one in mine if one.status == status and (value := getattr(one, variable)) is not None)

    return max(values(DIVERGED), default=0.0) > max(values(DONE), default=0.0) * (1 + 1e-9)


def _cells(study: StudyFile, grid: _Grid) -> tuple[list[Placed], list[Cell], list[DroppedCells]]:
    """New rates with every batch that was there, every rate with the new batches; and what cannot run."""
    found: list[Cell] = []
    there: list[Placed] = []
    unfit: list[DroppedCells] = []
    old = {round(batch / study.base.data.seq_length) for batch in grid.batches}
    for batches, rates in ((grid.batches, grid.new_rates), (grid.new_batches, [*grid.rates, *grid.new_rates])):
        placed = [place(study, grid.shape, batch) for batch in batches] if rates else []
        if batches is grid.new_batches:  # devices may share no batch beyond those that were tried
            placed = [one for one in placed if one.sequences not in old]
        fits = [one for one in placed if one.why_not is None]
        unfit += [
            DroppedCells(f"{grid.shape.name}, {one.sequences} sequences per step", len(rates), None, one.why_not)
            for one in placed
            if one.why_not is not None
        ]
        if fits:
            more = cells(replace(study, learning_rates=tuple(rates)), fits)
            found += [cell for cell in more if _was_there(cell, grid.tokens)]
            there += fits
    return there, found, unfit


def _was_there(cell: Cell, tokens: Sequence[float]) -> bool:
    """Whether the plan has this horizon; whole steps of another batch make nearly the same of it."""
    return any(abs(math.log(cell.tokens / one)) < SAME_HORIZON for one in tokens)
