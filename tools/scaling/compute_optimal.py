"""The best N for a compute budget: from the fitted surface, from isoflop profiles, and from the envelope of all runs.

These are approaches 3, 2 and 1 of Hoffmann et al. (arXiv 2203.15556). C is 6 N D.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.scaling.observations import Array
from tools.scaling.surface import Points, Surface, fittable

_PROFILES = 9


@dataclass(frozen=True)
class Profile:
    """One isoflop profile.

    Args:
        flops: C.
        params: N of its points, [n].
        loss: L there, measured or between measured horizons, [n].
        best_params: N at the vertex of a parabola in ln N; None where it has none inside the points.
        best_loss: L there.
    """

    flops: float
    params: Array
    loss: Array
    best_params: float | None
    best_loss: float | None


@dataclass(frozen=True)
class ComputeAllocation:
    """N_opt = factor x C^exponent.

    Args:
        approach: envelope, isoflop or surface.
        factor: N at one FLOP.
        exponent: of C.
        flops: of the points it was fitted to, [n].
        params: best N there, [n].
        interval: 90 % of the exponent; None where there are no bootstrap resamples.
    """

    approach: str
    factor: float
    exponent: float
    flops: Array
    params: Array
    interval: tuple[float, float] | None = None


def profiles(points: Points) -> list[Profile]:
    """Losses at equal compute: for each model between its horizons, never beyond them."""
    curves = _curves(points)
    if len(curves) < 3:
        return []
    starts = np.sort([6 * n * np.exp(d[0]) for n, d, _ in curves])
    ends = np.sort([6 * n * np.exp(d[-1]) for n, d, _ in curves])
    # Where at least three models reach.
    low, high = starts[2], ends[-3]
    if not high > low:
        return []
    found = []
    for flops in np.exp(np.linspace(np.log(low), np.log(high), _PROFILES)):
        params, loss = [], []
        for n, d, y in curves:
            wanted = np.log(flops / (6 * n))
            if d[0] - 1e-9 <= wanted <= d[-1] + 1e-9:
                params.append(n)
                loss.append(float(np.exp(_between(d, y, wanted))))
        if len(params) >= 3:
            found.append(_profile(float(flops), np.array(params), np.array(loss)))
    return found


def _curves(points: Points) -> list[tuple[float, Array, Array]]:
    """N, ln D and ln L of every dense model with at least two horizons, small to large."""
    found = []
    dense = points.only(points.sparsity <= 1)
    for n in np.unique(dense.params):
        mine = dense.params == n
        tokens, where = np.unique(dense.tokens[mine], return_inverse=True)
        if len(tokens) >= 2:
            loss = np.bincount(where, weights=dense.log_loss[mine]) / np.bincount(where)
            found.append((float(n), np.log(tokens), loss))
    return found


def _between(x: Array, y: Array, wanted: float) -> float:
    from scipy.interpolate import PchipInterpolator

    if len(x) == 2:
        return float(np.interp(wanted, x, y))
    return float(PchipInterpolator(x, y)(np.clip(wanted, x[0], x[-1])))


def _profile(flops: float, params: Array, loss: Array) -> Profile:
    x, y = np.log(params), np.log(loss)
    second, first, constant = np.polyfit(x - x.mean(), y, 2)
    if second <= 0:
        return Profile(flops, params, loss, None, None)
    vertex = -first / (2 * second)
    if not x.min() <= vertex + x.mean() <= x.max():
        return Profile(flops, params, loss, None, None)
    return Profile(
        flops,
        params,
        loss,
        float(np.exp(vertex + x.mean())),
        float(np.exp(constant + first * vertex + second * vertex**2)),
    )


def from_profiles(found: list[Profile]) -> ComputeAllocation | None:
    """Approach 2: a power law through the vertices."""
    inner = [(one.flops, one.best_params) for one in found if one.best_params is not None]
    return _power_law("isoflop", np.array([c for c, _ in inner]), np.array([n for _, n in inner]))


def envelope(points: Points) -> NDArray[np.int_]:
    """Which points no other beats with less compute, by index, small compute first."""
    compute = points.params * points.tokens
    order = np.argsort(compute, kind="stable")
    best, kept = np.inf, []
    for index in order:
        if points.log_loss[index] < best:
            best = points.log_loss[index]
            kept.append(index)
    return np.array(kept, dtype=int)


def from_envelope(points: Points) -> ComputeAllocation | None:
    """Approach 1 over final losses: a power law through N of the dense points on the envelope."""
    dense = points.only(points.sparsity <= 1)
    chosen = dense.only(envelope(dense))
    if not len(dense.params) or not fittable(dense) or len(np.unique(chosen.params)) < 3:
        return None
    return _power_law("envelope", 6 * chosen.params * chosen.tokens, chosen.params)


def from_surface(surface: Surface) -> ComputeAllocation | None:
    """Approach 3: where A / N^alpha + B / D^beta is least under 6 N D = C, in closed form; None if nowhere."""
    alpha, beta = surface.named("alpha"), surface.named("beta")
    if not (alpha > 0 and beta > 0):
        return None
    ln_factor = (np.log(alpha / beta) + surface.named("ln_A") - surface.named("ln_B")) / (alpha + beta)
    exponent = beta / (alpha + beta)
    ln_factor -= exponent * np.log(6.0)
    if not abs(ln_factor) < 700:
        return None
    first, second = surface.names.index("alpha"), surface.names.index("beta")
    interval = surface.interval(lambda theta: theta[:, second] / (theta[:, first] + theta[:, second]))
    empty = np.array([])
    return ComputeAllocation("surface", float(np.exp(ln_factor)), float(exponent), empty, empty, interval)


def _power_law(approach: str, flops: Array, params: Array) -> ComputeAllocation | None:
    if len(set(np.round(np.log(flops), 6))) < 3:
        return None
    exponent, constant = np.polyfit(np.log(flops), np.log(params), 1)
    return ComputeAllocation(approach, float(np.exp(constant)), float(exponent), flops, params)
