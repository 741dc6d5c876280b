"""Fill-in-the-middle: documents rearranged so that the model learns to write what is missing between two parts.

M. Bavarian et al., arXiv 2207.14255: a document is cut at two places chosen at random; the order of the parts is
prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM, in the variant that begins with both sentinels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.reading.samples import Sample
from megatron_qwen.errors import DataError, Problem

SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# (begin, end, whole): a document, or a part of one, in a sample; whether it includes its end-of-document token.
Piece = tuple[int, int, bool]
# Documents with fewer tokens are left unchanged.
_LEAST = 16


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges documents for fill-in-the-middle.

    Args:
        rate: share of the documents.
        spm_rate: of those, the share in the order suffix, prefix, middle.
        prefix: id of the sentinel before the prefix.
        middle: before the middle.
        suffix: before the suffix.
    """

    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int

    @classmethod
    def of(cls, control_tokens: Mapping[str, int], *, rate: float, spm_rate: float, where: str) -> "FillInTheMiddle":
        """With the sentinels of a tokenizer.

        Raises:
            DataError: it has none.
        """
        if missing := [name for name in SENTINELS if name not in control_tokens]:
            fix = f"needs the control tokens {', '.join(missing)}, which the data's tokenizer lacks; set it to 0."
            raise DataError(Problem(where, rate, fix))
        prefix, middle, suffix = (control_tokens[name] for name in SENTINELS)
        return cls(rate, spm_rate, prefix, middle, suffix)

    def __call__(self, sample: Sample, documents: Sequence[Piece], *, key: tuple[int, ...]) -> Sample:
        """Rearranges some documents of a sample; its length stays, so each loses its last three tokens to sentinels.

        Args:
            sample: as it was read.
            documents: the documents in it, and parts of documents.
            key: decides which of them, and where they are cut.
        """
        random = np.random.default_rng([abs(part) for part in key])
        tokens, labels, mask = sample.tokens.copy(), sample.labels.copy(), sample.loss_mask.copy()
        ends = {end for _, end, whole in documents if whole}
        for begin, end, whole in documents:
            chosen, spm = random.random(2)
            stop = end - 1 if whole else end  # the end-of-document token stays last
            if chosen >= self.rate or stop - begin < _LEAST:
                continue
            content = tokens[begin:stop]
            low, high = sorted(random.integers(0, len(content) - len(SENTINELS) + 1, size=2).tolist())
            tokens[begin:stop] = self._arranged(content, low, high, spm < self.spm_rate)
            labels[begin : end - 1] = tokens[begin + 1 : end]
            if begin in ends:  # otherwise the text before it continues in another sample
                labels[begin - 1] = tokens[begin]
            if not whole:
                mask[end - 1] = 0.0  # the true next token follows the suffix, not the middle
        return replace(sample, tokens=tokens, labels=labels, loss_mask=mask)

    def _arranged(self, content: npt.NDArray[np.int64], low: int, high: int, spm: bool) -> npt.NDArray[np.int64]:
        prefix, middle, suffix = content[:low], content[low:high], content[high : len(content) - len(SENTINELS)]
        if spm:
            parts = [[self.prefix, self.suffix], suffix, [self.middle], prefix, middle]
        else:
            parts = [[self.prefix], prefix, [self.suffix], suffix, [self.middle], middle]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
