"""Fields of samples and batches that only some objectives need: advantages, rewards, log-probabilities of a reference.

A sample source declares the fields that its samples have, an objective those that it needs, and a run is refused where
the source lacks one. In between, batches carry them without knowing what they mean.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExtraField:
    """A field in addition to tokens, labels, loss mask and positions.

    Args:
        name: its key in ``Sample.extra`` and ``Batch.extra``.
        dtype: of its values.
        per: ``token``: a sample has [s] values, which are cut over context-parallel ranks as its tokens are;
            ``sequence``: one value for each independent sequence of a sample, the same on all of these ranks.
    """

    name: str
    dtype: Literal["float32", "int64"]
    per: Literal["token", "sequence"]

    def require(self, values: npt.NDArray[np.generic], *, tokens: int, sequences: int) -> None:
        """Asserts that a sample's values are what the field says; a source that breaks its word is a fault in code."""
        expected = (tokens if self.per == "token" else sequences,)
        assert values.shape == expected, f"{self.name}: shape {values.shape} instead of {expected}"
        assert values.dtype == self.dtype, f"{self.name}: {values.dtype} instead of {self.dtype}"
