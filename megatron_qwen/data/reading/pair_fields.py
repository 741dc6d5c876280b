"""Fields of samples whose documents are pairs of answers: which sequence is which, and what a reference thinks."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample

# 1 for the chosen answer of a pair, -1 for the rejected one, 0 for padding; the rejected one follows the chosen.
SIDE = ExtraField("pair_side", "int64", "sequence")
# Number of the sequence in its sample that a token is of.
SEQUENCE = ExtraField("pair_sequence", "int64", "token")
# Sum of the reference's log-probabilities of the answer's tokens.
REFERENCE = ExtraField("reference_logp", "float32", "sequence")
# Number of the pair in its source, of both its sequences; -1 for padding.
PAIR = ExtraField("pair_number", "int64", "sequence")

CHOSEN, REJECTED = 1, -1
# Sums of log-probabilities of a source's answers, [documents, 2]: chosen and rejected.
Reference = npt.NDArray[np.float32]


class PairFields:
    """``SampleFields`` of pairs.

    Args:
        referred: batches have the reference's field.
        references: by source; None while they are not known yet: until then samples lack the field.
    """

    def __init__(self, *, referred: bool, references: Mapping[str, Reference] | None = None) -> None:
        self.fields: tuple[ExtraField, ...] = (SIDE, SEQUENCE, PAIR, *((REFERENCE,) if referred else ()))
        self._references = references

    def of(self, sample: Sample, source: str) -> Sample:
        """A sample with its fields."""
        pairs = len(sample.documents)
        assert sample.members == (2,) * pairs  # checked when the source was opened
        side = np.zeros(len(sample.starts), dtype=np.int64)
        side[0 : 2 * pairs : 2], side[1 : 2 * pairs : 2] = CHOSEN, REJECTED
        numbers = np.full(len(sample.starts), -1, dtype=np.int64)
        numbers[: 2 * pairs] = np.repeat(np.asarray(sample.documents, dtype=np.int64), 2)
        lengths = np.diff(np.append(sample.starts, len(sample.tokens)))
        own: dict[str, npt.NDArray[np.generic]] = {
            SIDE.name: side,
            SEQUENCE.name: np.repeat(np.arange(len(sample.starts), dtype=np.int64), lengths),
            PAIR.name: numbers,
        }
        if self._references is not None:
            known = np.zeros(len(sample.starts), dtype=np.float32)
            known[: 2 * pairs] = self._references[source][list(sample.documents)].reshape(-1)
            own[REFERENCE.name] = known
        return replace(sample, extra={**sample.extra, **own})
