"""The achieved fraction of peak, fitted to the speeds of finished steps."""

import statistics
from collections.abc import Callable, Sequence

# A round leaves the share of the error that communication and the optimizer have of the step: at one half, 20 leave
# 1e-6.
_ROUNDS = 20


def fit_achieved(steps: Sequence[tuple[float, Callable[[float], float]]]) -> float:
    """The achieved fraction for which the geometric mean of measured / predicted is 1.

    Args:
        steps: for each, the measured speed, and a function from an achieved fraction to the predicted speed.
    """
    achieved = 1.0
    for _ in range(_ROUNDS):  # a fixed-point iteration: communication and the optimizer do not scale with it
        achieved *= statistics.geometric_mean([seen / predict(achieved) for seen, predict in steps])
    return achieved
