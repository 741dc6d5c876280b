"""The loss over N and D, for MoE models also over all parameters and granularity: fit, intervals, prediction error."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.scaling import law
from tools.scaling.law import Terms
from tools.scaling.observations import Array, Chosen

LOW, HIGH = 5.0, 95.0
# Minimum standard deviation of ln N, and of ln D about its regression line over ln N. Below it the exponents of N and D
# cannot be separated.
LEAST_SPREAD = 0.3
# With at least so many points per coefficient the points are resampled (pairs bootstrap); with fewer, the residuals,
# because a resample of few points can leave a coefficient without data.
_MANY = 20
# Standard deviation of ln S and ln G below which the points do not determine their exponents.
_TOLD_APART = 0.05


@dataclass(frozen=True)
class Points:
    """Losses at the best settings, one a model and horizon.

    Args:
        params: N, active parameters of an MoE model, [n].
        tokens: D, [n].
        log_loss: ln L, [n].
        sparsity: all parameters over active ones, 1 for a dense model, [n].
        granularity: a dense feed-forward over an expert, 1 for a dense model, [n].
    """

    params: Array
    tokens: Array
    log_loss: Array
    sparsity: Array
    granularity: Array

    def only(self, chosen: Chosen) -> "Points":
        """Some of them."""
        return Points(
            *(getattr(self, name)[chosen] for name in ("params", "tokens", "log_loss", "sparsity", "granularity"))
        )

    @property
    def has_moe(self) -> bool:
        """Whether any is an MoE model."""
        return bool((self.sparsity > 1).any())

    @property
    def factors(self) -> tuple[str, ...]:
        """Which of sigma and gamma the points tell: what differs, and not only along with the other."""
        first, second = np.log(self.sparsity), np.log(self.granularity)
        found = ("sigma",) if first.std() > _TOLD_APART else ()
        base = np.stack((np.ones_like(first), first)[: 1 + len(found)], axis=1)
        rest = second - base @ np.linalg.lstsq(base, second, rcond=None)[0]
        return (*found, "gamma") if rest.std() > _TOLD_APART else found

    def terms(self, factors: tuple[str, ...] | None = None) -> Terms:
        """The law over them.

        Args:
            factors: of MoE models; None are those that the points tell.
        """
        factors = self.factors if factors is None else factors
        sparsity = self.sparsity if "sigma" in factors else None
        granularity = self.granularity if "gamma" in factors else None
        return law.moe(self.params, self.tokens, sparsity, granularity)


@dataclass(frozen=True)
class Surface:
    """The fitted loss.

    Args:
        names: of the coefficients.
        coefficients: [p].
        draws: the coefficients in bootstrap resamples, [draws, p].
        resampled: what was resampled: points or residuals.
        spread: standard deviation of ln L about the fit.
        points: how many were fitted.
        largest: N, D and N D of what was fitted, each the largest.
    """

    names: tuple[str, ...]
    coefficients: Array
    draws: Array
    resampled: str
    spread: float
    points: int
    largest: tuple[float, float, float]

    def interval(self, value: Callable[[Array], Array]) -> tuple[float, float]:
        """90 % interval of anything that follows from the coefficients.

        Args:
            value: [draws, p] -> [draws].
        """
        low, high = np.percentile(value(self.draws), [LOW, HIGH])
        return float(low), float(high)

    def named(self, name: str) -> float:
        """One coefficient."""
        return float(self.coefficients[self.names.index(name)])

    def loss(self, points: Points) -> Array:
        """L of points, [n]."""
        return np.exp(self._terms(points).predict(self.coefficients))

    def loss_draws(self, points: Points) -> Array:
        """L of points in bootstrap resamples, [draws, n]."""
        return np.exp(self._terms(points).predict(self.draws))

    def on_par(self, sparsity: float, granularity: float) -> tuple[float, float, float]:
        """Parameters of the dense model on par with an MoE model, over its active ones, and the 90 % interval.

        An MoE model of N active parameters has the loss of a dense model of N S^(sigma / alpha) G^(gamma / alpha), at
        any D: what section 3.2 of the Qwen2.5 report (arXiv 2412.15115) used its scaling laws for.

        Args:
            sparsity: S, all parameters over active ones.
            granularity: G, a dense feed-forward over an expert.
        """
        logs = {"sigma": np.log(sparsity), "gamma": np.log(granularity)}
        alpha = self.names.index("alpha")

        def factor(theta: Array) -> Array:
            power = sum(theta[:, self.names.index(name)] * log for name, log in logs.items() if name in self.names)
            times: Array = np.exp(np.clip(power / theta[:, alpha], -50, 50))
            return times

        return float(factor(self.coefficients[None])[0]), *self.interval(factor)

    def _terms(self, points: Points) -> Terms:
        return points.terms(tuple(name for name in ("sigma", "gamma") if name in self.names))


def fit(points: Points, *, draws: int, seed: int, delta: float = law.DELTA) -> Surface:
    """Fits the law and its intervals.

    With fewer than 20 points per coefficient, resampled points leave some coefficients without data, and the intervals
    are too narrow, because points at the ends have high leverage. Then the residuals are resampled. Each is scaled by
    the leverage of its point, and all by Student's quantile over the normal one for their small number.

    Args:
        points: more than the law has coefficients.
        draws: bootstrap resamples.
        seed: of the drawing.
        delta: of the Huber loss.
    """
    terms = points.terms()
    found = law.fit(terms, points.log_loss, delta=delta)
    residual = points.log_loss - terms.predict(found)
    count, free = len(residual), max(1, len(residual) - terms.size)
    generator = np.random.default_rng(seed)
    if count >= _MANY * terms.size:
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
        resamples = law.refit(terms, points.log_loss[None], weights, start=found, delta=delta)
    else:
        scaled = _scaled(terms, found, residual)
        drawn = terms.predict(found) + _smoothed(scaled, (draws, count), generator)
        resamples = law.refit(terms, drawn, np.ones((1, count)), start=found, delta=delta)
    return Surface(
        terms.names,
        found,
        resamples,
        "points" if count >= _MANY * terms.size else "residuals",
        float(np.sqrt((residual**2).sum() / free)),
        count,
        (float(points.params.max()), float(points.tokens.max()), float((points.params * points.tokens).max())),
    )


def _scaled(terms: Terms, found: Array, residual: Array) -> Array:
    """Residuals scaled to the scatter of the points: a fit reduces them by sqrt(1 - leverage), most at the ends."""
    from scipy.stats import norm, t

    # Leverage is the diagonal of the hat matrix of the linearised law: Q Q^T with Q from the QR factors of the slopes,
    # which are central differences. It is capped, because a point with leverage 1 has no residual of its own.
    step = 1e-6
    slopes = np.stack([terms.predict(found + step * unit) for unit in np.eye(terms.size)], axis=1)
    slopes -= np.stack([terms.predict(found - step * unit) for unit in np.eye(terms.size)], axis=1)
    orthogonal, _ = np.linalg.qr(slopes / np.maximum(np.abs(slopes).max(axis=0), 1e-300))
    leverage = np.minimum((orthogonal**2).sum(axis=1), 0.95)
    free = max(1, len(residual) - terms.size)
    centred = residual / np.sqrt(1 - leverage)
    return np.asarray((centred - centred.mean()) * (t.ppf(0.95, free) / norm.ppf(0.95)))


def _smoothed(residual: Array, shape: tuple[int, int], generator: np.random.Generator) -> Array:
    """Residuals resampled from their smoothed distribution, with the same spread.

    A robust fit passes exactly through some points, so some residuals are zero. Without smoothing these would make the
    resamples look more certain than the data (De Angelis, Hall and Young 1993, for least absolute deviations).
    """
    spread = float(residual.std())
    # Silverman's rule for the bandwidth of a normal kernel. The last factor restores the spread that the kernel adds.
    width = 1.06 * spread * len(residual) ** -0.2
    drawn = residual[generator.integers(0, len(residual), shape)] + width * generator.standard_normal(shape)
    return np.asarray(drawn * (spread / np.hypot(spread, width) if spread > 0 else 1.0))


def fittable(points: Points) -> bool:
    """Whether N and D differ enough, and not only together, for the law to have an exponent for each."""
    n, d = np.log(points.params), np.log(points.tokens)
    if len(np.unique(n.round(4))) < 3 or len(np.unique(d.round(2))) < 3 or n.std() < LEAST_SPREAD:
        return False
    slope, constant = np.polyfit(n, d, 1)
    return float((d - slope * n - constant).std()) > LEAST_SPREAD


@dataclass(frozen=True)
class LossPrediction:
    """Prediction of the largest models by a fit without them.

    Args:
        params: N that was left out.
        tokens: D of its points, [n].
        measured: L, [n].
        predicted: L by the fit to all smaller ones, [n].
    """

    params: float
    tokens: Array
    measured: Array
    predicted: Array

    @property
    def error(self) -> float:
        """Mean of |predicted / measured - 1|."""
        return float(np.abs(self.predicted / self.measured - 1).mean())


def leave_largest_out(points: Points, *, delta: float = law.DELTA) -> LossPrediction | None:
    """Fits without the largest N and predicts it; None where too few points would be left."""
    largest = points.params.max()
    out = points.params >= largest * (1 - 1e-9)
    rest = points.only(~out)
    left, terms = points.only(out), rest.terms()
    if len(rest.params) <= terms.size or not fittable(rest) or points.factors != rest.factors:
        return None
    found = law.fit(terms, rest.log_loss, delta=delta)
    surface = Surface(terms.names, found, found[None], "points", 0.0, len(rest.params), (0.0, 0.0, 0.0))
    return LossPrediction(float(largest), left.tokens, np.exp(left.log_loss), surface.loss(left))
