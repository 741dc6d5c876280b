"""What a law predicts of one run, with the interval that it has."""

import math
from dataclasses import dataclass

import numpy as np

from megatron_qwen.errors import ConfigError, Problem
from tools.scaling.basin import Basin
from tools.scaling.observations import Array
from tools.scaling.surface import HIGH, LOW, Points, Surface


@dataclass(frozen=True)
class Predicted:
    """A value of one run.

    Args:
        value: of the law.
        interval: 90 %: of the law, and of one run's scatter about it.
        draws: the value in resamples, with that scatter, [draws].
    """

    value: float
    interval: tuple[float, float]
    draws: Array


def predict(surface: Surface, basin: Basin | None, point: Points) -> Predicted:
    """The value at a point.

    Args:
        surface: the law.
        basin: of the settings, whose cells scatter too; None is none.
        point: one.
    """
    generator = np.random.default_rng(0)
    draws = np.log(surface.loss_draws(point)[:, 0])
    # A run scatters about the best of its settings as the cells of the study did.
    spread = math.hypot(surface.spread, basin.spread if basin is not None else 0.0)
    seen = np.exp(draws + spread * generator.standard_normal(len(draws)))
    low, high = np.percentile(seen, [LOW, HIGH])
    return Predicted(float(surface.loss(point)[0]), (float(low), float(high)), seen)


def point_of(points: Points, params: float, tokens: float) -> Points:
    """A size and its tokens, of the kind of model that was fitted.

    Raises:
        ConfigError: models of several kinds were.
    """
    kinds = {}
    for name in ("sparsity", "granularity"):
        fitted: Array = getattr(points, name)
        if np.ptp(fitted) > 1e-3 * fitted.min():
            fix = f"names no {name}, which the study has varied ({fitted.min():.3g} to {fitted.max():.3g}); use "
            raise ConfigError(Problem("--predict", f"{params:g},{tokens:g}", fix + "mq sweep prescribe."))
        kinds[name] = fitted[:1]
    return Points(np.array([params]), np.array([tokens]), np.zeros(1), kinds["sparsity"], kinds["granularity"])
