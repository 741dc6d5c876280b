"""From a continuous measure to a share of right answers: a sigmoid, fitted over models of all sizes.

The second of two steps (Bhagia et al. 2024, arXiv 2412.04403): a law says how the measure falls with N and D, this says
what share of answers is right at a value of the measure.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from megatron_qwen.errors import DataError, Problem
from tools.scaling.observations import Array

_LEAST = 5  # points for four coefficients
_DRAWS, _FEWEST_DRAWS = 400, 50


@dataclass(frozen=True)
class ScoreLink:
    """The sigmoid: low + (high - low) / (1 + exp((x - middle) / width)).

    Args:
        coefficients: low, high, middle, width.
        draws: the same in bootstrap resamples of the models, [draws, 4].
        spread: standard deviation of the scores about it.
    """

    coefficients: Array
    draws: Array
    spread: float

    def score(self, measure: float) -> float:
        """The share of right answers at a value of the measure."""
        return float(_sigmoid(np.array([measure]), *self.coefficients)[0])

    def interval(self, measures: Array, *, seed: int = 0) -> tuple[float, float]:
        """90 % interval of a model's score.

        Args:
            measures: values that the law of the measure gives in its own resamples, [draws].
            seed: of what pairs the two.
        """
        generator = np.random.default_rng(seed)
        chosen = self.draws[generator.integers(len(self.draws), size=len(measures))]
        found = _sigmoid(measures, *chosen.T) + self.spread * generator.standard_normal(len(measures))
        low, high = np.percentile(np.clip(found, 0, 1), [5, 95])
        return float(low), float(high)


def link(measures: Sequence[float], scores: Sequence[float], *, seed: int = 0) -> ScoreLink:
    """Fits the sigmoid by least squares.

    Args:
        measures: a continuous measure that falls, of every model.
        scores: share of right answers of the same models.
        seed: of the resamples.

    Raises:
        DataError: the scores do not depend on the measure, or there are too few.
    """
    x, y = np.array(measures, dtype=float), np.array(scores, dtype=float)
    found = _fit(x, y) if len(x) >= _LEAST else None
    if found is None:
        fix = f"do not determine how they depend on the measure ({len(x)} models, {y.min():.3f} to {y.max():.3f})."
        raise DataError(Problem("scores", None, fix))
    generator = np.random.default_rng(seed)
    resamples = (generator.integers(len(x), size=len(x)) for _ in range(_DRAWS))
    draws = [one for chosen in resamples if (one := _fit(x[chosen], y[chosen], start=found)) is not None]
    if len(draws) < _FEWEST_DRAWS:
        fix = f"do not determine how they depend on the measure: {len(draws)} of {_DRAWS} resamples could be fitted."
        raise DataError(Problem("scores", None, fix))
    spread = float(np.sqrt(np.mean((_sigmoid(x, *found) - y) ** 2) * len(x) / max(1, len(x) - len(found))))
    return ScoreLink(found, np.array(draws), spread)


def _fit(x: Array, y: Array, start: Array | None = None) -> Array | None:
    reach = float(np.ptp(x))
    if not reach or not np.ptp(y):
        return None
    first = [y.min(), min(1.0, y.max() + 0.1), float(np.median(x)), reach / 4] if start is None else start
    bounds = ([0.0, 0.0, x.min() - 2 * reach, reach / 100], [1.0, 1.0, x.max() + 2 * reach, 10 * reach])
    first = np.clip(first, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            found, _ = curve_fit(_sigmoid, x, y, p0=first, bounds=bounds, maxfev=2000)
    except RuntimeError:  # no convergence
        return None
    return np.asarray(found) if found[1] > found[0] else None


def _sigmoid(x: Array, low: Array | float, high: Array | float, middle: Array | float, width: Array | float) -> Array:
    return low + (high - low) / (1 + np.exp(np.clip((x - middle) / width, -50, 50)))
