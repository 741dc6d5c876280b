"""The share of a device's ceilings that steps have reached, from their speeds."""

import statistics
from collections.abc import Callable, Sequence

_ROUNDS = 20


def fit_achieved(steps: Sequence[tuple[float, Callable[[float], float]]]) -> float:
    """The share that makes predictions right in the geometric mean.

    Args:
        steps: of each, the speed that was seen, and what is predicted with a share.
    """
    achieved = 1.0
    for _ in range(_ROUNDS):  # the share acts on most of a step, not on all of it
        achieved *= statistics.geometric_mean([seen / predict(achieved) for seen, predict in steps])
    return achieved
