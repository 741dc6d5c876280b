"""Which source the next sample comes from: every source has had its share at every moment, to less than one sample.

R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): among the sources that may be next
without getting ahead of their share, the one that would fall behind it first. With k sources no count is ever off by
more than 1 - 1 / (2k - 2).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ROUNDING = 1e-9


class Apportionment:
    """Gives samples to sources by weight.

    Args:
        weights: share of each source, in any unit, above zero.
        counts: samples each has had already.
    """

    def __init__(self, weights: Sequence[float], counts: Sequence[int] | None = None) -> None:
        raw = np.asarray(weights, dtype=np.float64)
        self.weights: npt.NDArray[np.float64] = raw / raw.sum()
        self.counts = np.zeros(len(raw), dtype=np.int64) if counts is None else np.array(counts, dtype=np.int64)
        self.given = int(self.counts.sum())
        self._slack = 1 / (2 * len(raw) - 2) if len(raw) > 1 else 0.0
        self._period = 1 / self.weights

    def next(self) -> tuple[int, int]:
        """The source of the next sample, and the number of that sample among the source's own."""
        self.given += 1
        if len(self.counts) == 1:
            chosen = 0
        else:
            behind = self.weights * self.given - self.counts
            deadline = (1 - self._slack - behind) * self._period
            deadline[behind < self._slack - _ROUNDING] = np.inf
            chosen = int(deadline.argmin())
        index = int(self.counts[chosen])
        self.counts[chosen] += 1
        return chosen, index
