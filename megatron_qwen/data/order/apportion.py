"""Which source the next sample comes from: at any time every source has had its share, to within one sample.

Random choice by weight would leave a rare source several samples off its share, and would need a generator state in the
checkpoint. This is R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): among the sources
that would not exceed their share by the next sample, take the one that would fall short of it first. With k sources no
count is ever off by more than 1 - 1 / (2k - 2). The counts are the whole state.

Example with weights 0.5, 0.25, 0.25: after 4 samples the counts are 2, 1, 1, after 8 they are 4, 2, 2.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# A source exactly at its slack may be chosen, in spite of float64 rounding.
_ROUNDING = 1e-9


class Apportionment:
    """Gives samples to sources by weight.

    Args:
        weights: share of each source, in any unit, above zero.
        counts: samples that each source has given already.
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
