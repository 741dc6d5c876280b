"""Whether the loss or gradient norm of a step is an outlier among those before it: a robust z-score."""

import math
import statistics
from collections import deque

# Of a normal distribution, median absolute deviation / standard deviation (the 75 % quantile).
_MAD_OF_SIGMA = 0.6745
# Values before which there is no score: the median of fewer follows each new one. Chosen by hand.
_LEAST_VALUES = 16
# Least spread that counts, as a share of the median. A loss that has converged varies in the fourth digit, and a change
# of the third would else be an outlier. Chosen by hand.
_LEAST_SPREAD = 0.01


class SpikeScore:
    """Scores values of one figure against the median of the last ones.

    Median and median absolute deviation, unlike mean and standard deviation, do not follow the spikes that they are to
    find.

    Args:
        window: finite values that are kept.
    """

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def score(self, value: float) -> float:
        """Robust standard deviations above the median; 0 where it is below or too few are known, inf if not finite."""
        if not math.isfinite(value):
            return math.inf
        if len(self._values) < min(_LEAST_VALUES, self._values.maxlen or 1):
            return 0.0
        middle = statistics.median(self._values)
        deviation = statistics.median(abs(known - middle) for known in self._values)
        sigma = max(deviation / _MAD_OF_SIGMA, _LEAST_SPREAD * abs(middle))
        return max(0.0, (value - middle) / sigma) if sigma else 0.0

    def add(self, value: float) -> None:
        """Takes a value into the window, unless it is not finite."""
        if math.isfinite(value):
            self._values.append(value)
