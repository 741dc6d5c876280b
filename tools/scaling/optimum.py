"""The best setting of every (N, D) by itself, its uncertainty, and what is wrong with the grid it was sought on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.scaling.basin import Cells, shapes
from tools.scaling.observations import Array

EDGE_LOW, EDGE_HIGH, FLAT, FEW = "edge low", "edge high", "flat", "few settings"
# A curvature that many standard errors above zero is one.
_SIGNIFICANT = 2.0
_DRAWS = 2000  # of the centre's distribution: 100 of them lie beyond each end of a 90 % interval


@dataclass(frozen=True)
class Optimum:
    """The best value of one setting at one (N, D).

    Args:
        group: number of the (N, D).
        variable: learning_rate or batch_tokens.
        value: the best; None where the cells do not say.
        low: 5th percentile of the uncertainty of ``value``, within what was tried, a factor 10 more either way.
        high: 95th percentile.
        flags: what stands against it.
        settings: how many values were tried and done.
    """

    group: int
    variable: str
    value: float | None
    low: float | None
    high: float | None
    flags: tuple[str, ...]
    settings: int


def optima(cells: Cells, *, inside: NDArray[np.bool_], spread: float, blocked_above: Array) -> list[Optimum]:
    """A quadratic in the logarithms for every (N, D), over its cells of the window.

    Args:
        cells: all that are done.
        inside: those near enough to the best for a quadratic.
        spread: standard deviation of a cell where a group has too few to tell by itself.
        blocked_above: whether a larger value than any that is done has diverged, [groups, v]: the best is then known
            to lie below, and its place at the upper end is no flaw of the grid.
    """
    found = []
    for group in range(cells.groups):
        mine = cells.group == group
        every = cells.settings[mine]
        near = mine & inside
        found += _of_group(
            cells, group, every, cells.settings[near], cells.log_loss[near], spread, blocked_above[group]
        )
    return found


def _of_group(
    cells: Cells, group: int, every: Array, settings: Array, log_loss: Array, spread: float, blocked: Array
) -> list[Optimum]:
    variables = every.shape[1]
    varied = [v for v in range(variables) if len(_distinct(every[:, v])) > 1]
    found = []
    fitted = _quadratic(settings[:, varied], log_loss, spread)
    for v in range(variables):
        tried = _distinct(every[:, v])
        name = cells.variables[v]
        if v not in varied or fitted is None:
            best = int(np.argmin(cells.log_loss[cells.group == group])) if len(every) else None
            flags = (FEW, *_at_the_end(every[:, v], best, bool(blocked[v]))) if v in varied else (FEW,)
            found.append(Optimum(group, name, None, None, None, flags, len(tried)))
            continue
        centre, draws, significant = fitted
        place = varied.index(v)
        found.append(_judged(group, name, float(centre[place]), draws[:, place], significant[place], tried, blocked[v]))
    return found


def _judged(
    group: int, name: str, centre: float, draws: Array, significant: bool, tried: Array, blocked: bool
) -> Optimum:
    lowest, highest = float(tried[0]), float(tried[-1])
    flags = []
    if not significant:
        flags.append(FLAT)
    if centre <= lowest:
        flags.append(EDGE_LOW)
    elif centre >= highest and not blocked:
        flags.append(EDGE_HIGH)
    reach = np.log(10.0)
    known = np.clip(draws, lowest - reach, highest + reach)
    value = None if not significant else float(np.exp(np.clip(centre, lowest - reach, highest + reach)))
    low, high = (float(np.exp(bound)) for bound in np.percentile(known, [5, 95]))
    return Optimum(group, name, value, low, high, tuple(flags), len(tried))


def _at_the_end(values: Array, best: int | None, blocked: bool) -> tuple[str, ...]:
    if best is None:
        return ()
    if values[best] <= values.min():
        return (EDGE_LOW,)
    return (EDGE_HIGH,) if values[best] >= values.max() and not blocked else ()


def _distinct(values: Array) -> Array:
    return np.unique(np.round(values, 6))


def _quadratic(settings: Array, log_loss: Array, spread: float) -> tuple[Array, Array, list[bool]] | None:
    """Vertex [v], draws of it [draws, v], and whether the curvature along each is one; None with too few cells."""
    count, variables = settings.shape
    pairs = [(i, j) for i in range(variables) for j in range(i, variables)]
    columns = 1 + variables + len(pairs)
    middle = settings.mean(axis=0) if count else np.zeros(variables)
    x = settings - middle
    squares = [x[:, i] * x[:, j] for i, j in pairs]
    design = np.column_stack((np.ones(count), *squares, x))
    if not variables or count < columns or np.linalg.matrix_rank(design) < columns:
        return None
    beta, *_ = np.linalg.lstsq(design, log_loss, rcond=None)
    residual = log_loss - design @ beta
    free = count - columns
    if free < 1 and spread == 0.0:
        return None
    # Few cells know little of their own scatter: that of all groups counts as five of theirs.
    variance = ((residual**2).sum() + 5 * spread**2) / (free + 5)
    covariance = variance * np.linalg.inv(design.T @ design)
    generator = np.random.default_rng(0)
    samples = generator.multivariate_normal(beta, covariance, size=_DRAWS, method="eigh")
    _, centres, minimum = shapes(samples[:, 1:], variables, 1)
    vertices = centres[minimum, 0] + middle
    _, centre, exists = shapes(beta[None, 1:], variables, 1)
    errors = np.sqrt(np.diag(covariance))
    along = [1 + place for place, (i, j) in enumerate(pairs) if i == j]
    significant = [bool(beta[place] > _SIGNIFICANT * errors[place]) for place in along]
    if not exists[0] or len(vertices) < _DRAWS // 2:
        return settings[int(np.argmin(log_loss))], vertices if len(vertices) else settings, [False] * variables
    return centre[0, 0] + middle, vertices, significant
