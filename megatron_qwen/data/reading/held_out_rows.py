"""Held-out conversations: whole documents packed into rows, as training reads them."""

from functools import cached_property

from megatron_qwen.data.order.packing import best_fit
from megatron_qwen.data.order.permutation import KeyedPermutation
from megatron_qwen.data.order.stream import TokenSpan
from megatron_qwen.data.reading.samples import Sample, packed
from megatron_qwen.data.reading.sources import HeldOut

_MOST = 1 << 16  # documents: they are packed at once, in well under a second


class HeldOutRows(HeldOut):
    """Rows of the documents at the end of a source that are never trained on, always in the same order.

    No document is longer than a row: fine-tuning refuses such sources (``conversations.py``).
    """

    is_packed = True

    @cached_property
    def _rows(self) -> list[list[TokenSpan]]:
        tokens = self.source.tokens
        first, stop = self.source.documents, min(tokens.num_documents, self.source.documents + _MOST)
        spans: list[TokenSpan] = []
        at = tokens.document_start(first)
        for length in tokens.lengths(first, stop).tolist():
            if 0 < length <= self.seq_length:
                spans.append((at, at + length))
            at += length
        rows = best_fit([end - begin for begin, end in spans], self.seq_length)
        return [[spans[item] for item in row] for row in rows]

    @cached_property
    def windows(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index`` of an endless stream."""
        epoch, position = divmod(index, self.windows)
        row = self._rows[KeyedPermutation(self.windows, self.seed, epoch)[position]]
        return packed(self.source.tokens, row, seq_length=self.seq_length, reading=self.reading)
