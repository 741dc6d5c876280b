"""Where learning rate and batch are best: a quadratic in logarithms, whose centre moves with N and D by power laws.

Every (N, D) has a level of its own; the shape of the basin is shared and its centre is linear in ln N and ln D. Written
out, ln L is linear in everything but the centre, which is a quotient of coefficients: one linear regression with a
constant for every (N, D) finds it, and a thousand bootstrap resamples cost one GEMM. Data of Step Law
(arXiv 2503.04715) show that the quadratic holds near the optimum only, so cells farther than ``WINDOW`` above the
centre, by the fit's own prediction, are left out of it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.scaling.observations import Array, Chosen

# How far above the best a cell may be, in ln L, for the quadratic to describe it: 1 % (data of Step Law, above).
WINDOW = 0.01
# A cell that the fit puts inside the window, but whose measured loss is so many windows above the best of its group, is
# not part of the basin: its training became unstable.
_SEEN = 4.0
_ROUNDS = 20
# Standard deviation of ln N, and of ln D about its line over ln N, below which a study does not tell what they do.
TOLD_APART = 0.2
# With at least so many (N, D) the resamples keep what the cells of one (N, D) have in common (wild cluster bootstrap);
# with fewer there are too few sign combinations to give an interval.
_GROUPS = 6


@dataclass(frozen=True)
class Cells:
    """Cells that are done, as arrays of one length.

    Args:
        group: number of the (N, D), from 0.
        log_params: ln N of every group, [groups].
        log_tokens: ln D of every group, [groups].
        settings: ln of what was varied, [n, variables].
        variables: names of the columns of ``settings``.
        log_loss: ln L, [n].
    """

    group: NDArray[np.int_]
    log_params: Array
    log_tokens: Array
    settings: Array
    variables: tuple[str, ...]
    log_loss: Array

    @property
    def groups(self) -> int:
        """How many (N, D) there are."""
        return len(self.log_params)

    def mean(self, values: Array) -> Array:
        """Mean over the cells of each group, [groups, ...]; [n, ...] comes in."""
        total = np.zeros((self.groups, *values.shape[1:]))
        np.add.at(total, self.group, values)
        count = np.bincount(self.group, minlength=self.groups)
        return total / np.maximum(count, 1).reshape(-1, *[1] * (values.ndim - 1))

    def only(self, chosen: Chosen) -> "Cells":
        """Some of the cells; the groups keep their numbers."""
        return Cells(
            self.group[chosen],
            self.log_params,
            self.log_tokens,
            self.settings[chosen],
            self.variables,
            self.log_loss[chosen],
        )


@dataclass(frozen=True)
class Basin:
    """The fitted basin.

    Args:
        variables: what was varied.
        features: what the centre depends on: constant, ln N, ln D; those that the data tell apart.
        curvature: second derivatives of ln L in the variables, [v, v].
        centre: ln of the best setting = features @ centre, [features, v].
        level: ln L of every group at its centre, [groups]; NaN where it has no cell in the window.
        draws: ``centre`` in bootstrap resamples, [draws, features, v]; those without a minimum are left out.
        spread: standard deviation of a cell about the fit, in ln L.
        inside: cells of the window, [n].
        without_minimum: share of resamples whose basin had none.
    """

    variables: tuple[str, ...]
    features: tuple[str, ...]
    curvature: Array
    centre: Array
    level: Array
    draws: Array
    spread: float
    inside: NDArray[np.bool_]
    without_minimum: float

    def best(self, log_params: Array, log_tokens: Array) -> Array:
        """ln of the best settings, [n, v]."""
        return _features(self.features, log_params, log_tokens) @ self.centre

    def best_draws(self, log_params: float, log_tokens: float) -> Array:
        """The same in bootstrap resamples, for one model, [draws, v]."""
        row = _features(self.features, np.array([log_params]), np.array([log_tokens]))[0]
        best: Array = np.einsum("f,dfv->dv", row, self.draws)
        return best


def fit(cells: Cells, *, draws: int, seed: int, window: float = WINDOW) -> Basin | None:
    """The basin, or None where the cells show no minimum.

    Args:
        cells: at least three settings in some groups.
        draws: bootstrap resamples for the intervals: residuals, scaled to their unbiased size, resampled.
        seed: of the drawing.
        window: height of what is fitted, in ln L.
    """
    names = _distinguishable(cells)
    at = _features(names, cells.log_params, cells.log_tokens)  # [groups, features]
    lowest = np.full(cells.groups, np.inf)
    np.minimum.at(lowest, cells.group, cells.log_loss)
    seen = cells.log_loss - lowest[cells.group]
    limit, inside = window, _nearest(seen, 2 * window, cells, at)
    for _ in range(_ROUNDS):
        found = _regress(cells.only(inside), at)
        if found is None:  # noise hides the curvature in so few cells: fit a larger window
            limit *= 2
            inside = _nearest(seen, 2 * limit, cells, at)
            continue
        height, residual = _height(cells, at, found)
        # A window narrower than the noise would select cells by their noise. 1.4826 x the median absolute residual
        # is the standard deviation of a normal distribution, robust to cells that became unstable.
        noise = 1.4826 * float(np.median(np.abs(residual[height <= limit]))) if (height <= limit).any() else 0.0
        limit = max(window, 2 * noise)
        # Of cells with normal noise fewer than one in a million is more than 5 standard deviations off.
        cap = max(_SEEN * window, limit + 5 * noise)
        now = _nearest(np.where(seen <= cap, height, np.inf), limit, cells, at)
        if np.array_equal(now, inside):
            break
        inside = now
    chosen = cells.only(inside)
    found = _regress(chosen, at)
    if found is None:
        return None
    design, beta, shape = found.design, found.beta, found.shape
    fitted, level = _levels(chosen, beta, at, shape)
    residual = chosen.log_loss - fitted
    used = len(np.unique(chosen.group)) + design.shape[1]
    free = len(residual) - used
    spread = float(np.sqrt((residual**2).sum() / free)) if free > 0 else 0.0
    samples, lost = _draws(chosen, design, fitted, residual, spread, draws, seed, len(names))
    return Basin(cells.variables, names, shape[0], shape[1], level, samples, spread, inside, lost)


@dataclass(frozen=True)
class _Regression:
    design: Array
    beta: Array
    shape: tuple[Array, Array]


def _regress(cells: Cells, at: Array) -> _Regression | None:
    """The basin of these cells; None where they do not determine it, or it has no minimum."""
    design = _design(cells, at)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    beta = _solve(design, cells)
    shape = _shape(beta, cells.settings.shape[1], at.shape[1])
    return None if shape is None else _Regression(design, beta, shape)


def _height(cells: Cells, at: Array, found: _Regression) -> tuple[Array, Array]:
    """How far above the best of its group the fit puts every cell, and the cell's residual, in ln L, [n] each."""
    curvature, centre = found.shape
    away = cells.settings - (at @ centre)[cells.group]
    height = 0.5 * np.einsum("nv,vw,nw->n", away, curvature, away)
    difference = cells.log_loss - height
    level = np.array([np.median(difference[cells.group == group]) for group in range(cells.groups)])
    return height, difference - level[cells.group]


def _nearest(height: Array, window: float, cells: Cells, at: Array) -> NDArray[np.bool_]:
    """Cells up to a height; the window grows until they are more than what is sought."""
    for _ in range(12):
        inside = height <= window
        chosen = cells.only(inside)
        columns = _design(chosen, at)
        free = int(inside.sum()) - len(np.unique(chosen.group)) - columns.shape[1]
        if free >= columns.shape[1] and np.linalg.matrix_rank(columns) == columns.shape[1]:
            break
        window *= 1.5
    return np.asarray(inside, dtype=bool)


def _distinguishable(cells: Cells) -> tuple[str, ...]:
    """What the centre can depend on: what differs between the groups, and not only along with what is there already."""
    names = ["1"]
    for name, values in (("ln_N", cells.log_params), ("ln_D", cells.log_tokens)):
        block = _features(tuple(names), cells.log_params, cells.log_tokens)
        rest = values - block @ np.linalg.lstsq(block, values, rcond=None)[0]
        if rest.std() > TOLD_APART:
            names.append(name)
    return tuple(names)


def _features(names: tuple[str, ...], log_params: Array, log_tokens: Array) -> Array:
    known = {"1": np.ones_like(log_params), "ln_N": log_params, "ln_D": log_tokens}
    return np.stack([known[name] for name in names], axis=1)


def _columns(settings: Array, at: Array) -> Array:
    """Regressors before groups are taken out: squares and products of the settings, then settings times features."""
    variables = settings.shape[1]
    pairs = [(i, j) for i in range(variables) for j in range(i, variables)]
    squares = [settings[:, i] * settings[:, j] for i, j in pairs]
    moving = [settings[:, i] * at[:, k] for i in range(variables) for k in range(at.shape[1])]
    return np.stack(squares + moving, axis=1)


def _design(cells: Cells, at: Array) -> Array:
    """Regressors less their mean in each group, [n, columns]."""
    columns = _columns(cells.settings, at[cells.group])
    return np.asarray(columns - cells.mean(columns)[cells.group])


def _solve(design: Array, cells: Cells) -> Array:
    centred = cells.log_loss - cells.mean(cells.log_loss)[cells.group]
    return np.asarray(np.linalg.lstsq(design, centred, rcond=None)[0])


def _shape(beta: Array, variables: int, features: int) -> tuple[Array, Array] | None:
    """Second derivatives [v, v] and the centre [features, v]; None where they are not those of a minimum."""
    curvature, centre, minimum = shapes(beta[None], variables, features)
    return (curvature[0], centre[0]) if minimum[0] else None


def shapes(betas: Array, variables: int, features: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Second derivatives [r, v, v], centres [r, features, v] and whether they are those of a minimum, [r].

    Args:
        betas: coefficients of squares and products, then of settings times features, [r, columns].
        variables: v.
        features: on which the centre depends.
    """
    pairs = [(i, j) for i in range(variables) for j in range(i, variables)]
    curvature = np.zeros((len(betas), variables, variables))
    for place, (i, j) in enumerate(pairs):
        curvature[:, i, j] = curvature[:, j, i] = betas[:, place] * (2.0 if i == j else 1.0)
    minimum = np.linalg.eigvalsh(curvature)[:, 0] > 0
    moving = betas[:, len(pairs) :].reshape(-1, variables, features)
    centre = np.full((len(betas), features, variables), np.nan)
    if minimum.any():
        centre[minimum] = -np.linalg.solve(curvature[minimum], moving[minimum]).transpose(0, 2, 1)
    return curvature, centre, minimum


def _levels(cells: Cells, beta: Array, at: Array, shape: tuple[Array, Array]) -> tuple[Array, Array]:
    """ln L as fitted, [n], and at the centre of every group, [groups]."""
    columns = _columns(cells.settings, at[cells.group])
    constant = cells.mean(cells.log_loss) - cells.mean(columns) @ beta
    there = _columns(at @ shape[1], at) @ beta + constant
    there[np.bincount(cells.group, minlength=cells.groups) == 0] = np.nan
    return columns @ beta + constant[cells.group], there


def _draws(
    cells: Cells, design: Array, fitted: Array, residual: Array, spread: float, draws: int, seed: int, features: int
) -> tuple[Array, float]:
    """Centres in bootstrap resamples, and the share of those without one."""
    nothing = np.zeros((0, features, cells.settings.shape[1]))
    if spread == 0.0 and len(residual) <= design.shape[1] + len(np.unique(cells.group)):
        return nothing, 0.0  # as many coefficients as cells: no residual is left to estimate the uncertainty from
    generator = np.random.default_rng(seed)
    size = float(np.sqrt((residual**2).mean()))
    groups = len(np.unique(cells.group))
    scaled = (residual - residual.mean()) * (spread / size if size > 0 else 0.0)
    if groups >= _GROUPS:
        # The optimum of a group can deviate from the law, so the residuals of its cells are correlated: they change
        # sign together (wild cluster bootstrap; Cameron, Gelbach and Miller 2008). The factor sqrt(G / (G - 1))
        # corrects for the number of clusters G.
        signs = generator.choice((-1.0, 1.0), size=(cells.groups, draws)) * np.sqrt(groups / (groups - 1))
        resamples = fitted[:, None] + scaled[:, None] * signs[cells.group]
    else:
        resamples = fitted[:, None] + scaled[generator.integers(0, len(scaled), (len(scaled), draws))]
    centred = resamples - cells.mean(resamples)[cells.group]
    betas = np.linalg.lstsq(design, centred, rcond=None)[0].T
    _, centres, minimum = shapes(betas, cells.settings.shape[1], features)
    return centres[minimum], 1 - float(minimum.mean())
