"""From observations to laws: optima, basin, surface, allocation and the error of prediction, in one result."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_qwen.errors import DataError, Problem
from tools.scaling import basin as basins
from tools.scaling import compute_optimal, law, surface
from tools.scaling.basin import Basin, Cells
from tools.scaling.compute_optimal import ComputeAllocation, Profile
from tools.scaling.observations import DIVERGED, DONE, STATUSES, Array, Observation, column
from tools.scaling.optimum import Optimum, optima
from tools.scaling.surface import LossPrediction, Points, Surface

VARIABLES = ("learning_rate", "batch_tokens")
# In ln D.
SAME_HORIZON = 0.03


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        embeddings: whether N counts the input embedding and the output matrix.
        draws: bootstrap resamples behind every interval.
        seed: of their drawing.
        delta: of the Huber loss, in ln L.
        window: how far above the best a cell may lie for the quadratic of its settings, in ln L.
    """

    embeddings: bool = False
    draws: int = 1000
    seed: int = 0
    delta: float = law.DELTA
    window: float = basins.WINDOW


@dataclass(frozen=True)
class Fit:
    """What the observations say.

    Args:
        settings: how it was fitted.
        counts: observations by status.
        points: loss at the best setting of every (N, D).
        point_source: how ``points`` were found.
        optima: best settings of every (N, D), by variable.
        basin: best settings as power laws; None where none were varied, or no minimum is there.
        surface: the law of the loss; None with too few points.
        allocations: best N for a compute, by approach.
        profiles: isoflop profiles.
        left_out: the largest N predicted from the smaller ones.
        notes: what a reader must know.
    """

    settings: Settings
    counts: dict[str, int]
    points: Points
    point_source: str
    optima: list[Optimum]
    basin: Basin | None
    surface: Surface | None
    allocations: list[ComputeAllocation]
    profiles: list[Profile]
    left_out: LossPrediction | None
    notes: list[str]

    @property
    def variables(self) -> tuple[str, ...]:
        """Settings that were varied."""
        return tuple(dict.fromkeys(one.variable for one in self.optima))


def fit(observations: Sequence[Observation], settings: Settings) -> Fit:
    """Fits everything that the observations allow; what they do not allow is said in the notes.

    Raises:
        DataError: there is nothing to fit.
    """
    counts = dict.fromkeys(STATUSES, 0) | Counter(one.status for one in observations)
    observations = _counted_as_asked(observations, settings)
    done = [one for one in observations if one.status == DONE]
    if not done:
        raise DataError(Problem("observations", len(observations), "have no finished cell; there is nothing to fit."))
    notes = [f"{counts[status]} {status}, not fitted" for status in STATUSES if status != DONE and counts[status]]
    if unknown := sum(one.total_params is not None and one.granularity is None for one in done):
        notes.append(f"{unknown} MoE models have no granularity: it is left out of the law")
        done = [replace(one, granularity=None) for one in done]
    varied = _varied(done)
    basin: Basin | None = None
    found: list[Optimum] = []
    if varied:
        complete = [one for one in done if all(getattr(one, name) is not None for name in varied)]
        if len(complete) < len(done):
            notes.append(f"{len(done) - len(complete)} observations without {' or '.join(varied)}, not fitted")
        cells, models = _cells(complete, varied)
        basin = basins.fit(cells, draws=settings.draws, seed=settings.seed, window=settings.window)
        inside = np.full(len(cells.log_loss), True) if basin is None else basin.inside
        spread = 0.0 if basin is None else basin.spread
        found = optima(cells, inside=inside, spread=spread, blocked_above=_blocked(observations, models, cells))
        points, source = _best(cells, models, basin, notes)
        notes += _basin_notes(cells, basin)
    else:
        points = _points(done, np.log(column(done, "loss")))
        source = "every observation"
    fitted, allocations, profiles, left_out = _surface(points, settings, notes)
    return Fit(settings, counts, points, source, found, basin, fitted, allocations, profiles, left_out, notes)


def _counted_as_asked(observations: Sequence[Observation], settings: Settings) -> list[Observation]:
    if not settings.embeddings:
        return list(observations)
    if missing := sum(one.embedding_params is None for one in observations if one.status == DONE):
        fix = f"is empty for {missing} observations; N with embeddings needs it."
        raise DataError(Problem("embedding_params", None, fix))
    counted = []
    for one in observations:
        extra = one.embedding_params or 0.0
        total = None if one.total_params is None else one.total_params + extra
        counted.append(replace(one, params=one.params + extra, total_params=total))
    return counted


def _varied(done: Sequence[Observation]) -> tuple[str, ...]:
    """Settings that differ within some (N, D)."""
    groups = same_models(done)
    found = []
    for name in VARIABLES:
        known = [[value for one in group if (value := getattr(one, name)) is not None] for group in groups]
        if any(len({round(float(np.log(value)), 6) for value in values}) > 1 for values in known):
            found.append(name)
    return tuple(found)


def _shape(one: Observation) -> tuple[float, ...]:
    """What makes two observations the same model."""
    sizes = (one.params, one.total_params or one.params, one.granularity or 1.0)
    return tuple(round(float(np.log(size)), 4) for size in sizes)


def same_models(observations: Sequence[Observation]) -> list[list[Observation]]:
    """Observations of the same model and horizon; tokens may differ by what whole steps of a batch make of them."""
    shapes: dict[object, list[Observation]] = {}
    for one in observations:
        shapes.setdefault(_shape(one), []).append(one)
    groups: list[list[Observation]] = []
    for members in shapes.values():
        first = -np.inf
        for one in sorted(members, key=lambda one: one.tokens):
            if np.log(one.tokens) - first > SAME_HORIZON:
                groups.append([])
                first = np.log(one.tokens)
            groups[-1].append(one)
    return groups


def _cells(done: Sequence[Observation], varied: tuple[str, ...]) -> tuple[Cells, list[list[Observation]]]:
    """Cells by group, and the observations of each group."""
    members = same_models(done)
    order = [one for group in members for one in group]
    number = np.repeat(np.arange(len(members)), [len(group) for group in members])
    return Cells(
        number,
        np.array([np.log(group[0].params) for group in members]),
        np.array([np.mean([np.log(one.tokens) for one in group]) for group in members]),
        np.stack([np.log(column(order, name)) for name in varied], axis=1),
        varied,
        np.log(column(order, "loss")),
    ), members


def _blocked(observations: Sequence[Observation], models: list[list[Observation]], cells: Cells) -> Array:
    """Whether something larger than all that is done has diverged, [groups, v]."""
    blocked = np.zeros((len(models), len(cells.variables)), dtype=bool)
    diverged = [one for one in observations if one.status == DIVERGED]
    for index, group in enumerate(models):
        highest = cells.settings[cells.group == index].max(axis=0)
        for one in diverged:
            if _shape(one) != _shape(group[0]) or abs(np.log(one.tokens) - cells.log_tokens[index]) > SAME_HORIZON:
                continue
            for v, name in enumerate(cells.variables):
                value = getattr(one, name)
                blocked[index, v] |= value is not None and np.log(value) > highest[v] + 1e-9
    return blocked


def _best(cells: Cells, models: list[list[Observation]], basin: Basin | None, notes: list[str]) -> tuple[Points, str]:
    """Loss of every (N, D) at its best setting."""
    heads = [group[0] for group in models]
    lowest = np.full(cells.groups, np.inf)
    np.minimum.at(lowest, cells.group, cells.log_loss)
    if basin is None:
        return _points(heads, lowest, tokens=np.exp(cells.log_tokens)), "the lowest cell of every model and horizon"
    if lost := int(np.isnan(basin.level).sum()):
        notes.append(f"{lost} models and horizons have no cell near the best settings: their lowest cell is used")
    level = np.where(np.isnan(basin.level), lowest, basin.level)
    return _points(heads, level, tokens=np.exp(cells.log_tokens)), "the fitted basin at its centre"


def _points(models: Sequence[Observation], log_loss: Array, *, tokens: Array | None = None) -> Points:
    params, total, granularity = (column(models, name) for name in ("params", "total_params", "granularity"))
    return Points(
        params,
        column(models, "tokens") if tokens is None else tokens,
        log_loss,
        np.where(np.isnan(total), 1.0, total / params),
        np.where(np.isnan(granularity), 1.0, granularity),
    )


def _basin_notes(cells: Cells, basin: Basin | None) -> list[str]:
    names = " and ".join(cells.variables)
    if basin is None:
        return [f"no minimum over {names}: the cells lie too far from the best, or are too few; lowest cells are used"]
    notes = [
        f"{int(basin.inside.sum())} of {len(basin.inside)} cells are near enough to the best for a quadratic in {names}"
    ]
    if missing := [name for name in ("ln_N", "ln_D") if name not in basin.features]:
        notes.append(f"the study does not determine how the best {names} move with {' and '.join(missing)}")
    if not len(basin.draws):
        notes.append(
            f"there are no more cells than the basin over {names} has coefficients: its uncertainty cannot be estimated"
        )
    if basin.without_minimum > 0.01:
        share = f"{basin.without_minimum:.0%} of the bootstrap resamples have no minimum over {names}"
        notes.append(share + (": intervals of the best do not hold" if basin.without_minimum > 0.1 else ""))
    return notes


def _surface(
    points: Points, settings: Settings, notes: list[str]
) -> tuple[Surface | None, list[ComputeAllocation], list[Profile], LossPrediction | None]:
    found = compute_optimal.profiles(points)
    allocations = [one for one in (compute_optimal.from_envelope(points), compute_optimal.from_profiles(found)) if one]
    needed = points.terms().size + 1
    if len(points.params) < needed or not surface.fittable(points):
        notes.append(
            f"{len(points.params)} points do not make a law of the loss: it takes {needed}, three sizes and three "
            "horizons, and tokens that are not proportional to size"
        )
        return None, allocations, found, None
    fitted = surface.fit(points, draws=settings.draws, seed=settings.seed, delta=settings.delta)
    if not (fitted.named("alpha") > 0 and fitted.named("beta") > 0):
        notes.append("the loss does not fall with both size and tokens: no law is fitted")
        return None, allocations, found, None
    if points.has_moe and (missing := {"sigma", "gamma"} - set(fitted.names)):
        notes.append(f"the MoE models do not determine {' and '.join(sorted(missing))}")
    if allocation := compute_optimal.from_surface(fitted):
        allocations.append(allocation)
    left_out = surface.leave_largest_out(points, delta=settings.delta)
    if left_out is None:
        notes.append("too few sizes to leave the largest out and predict it")
    return fitted, allocations, found, left_out
