"""The samples of a validation: held-out windows of all sources, by weight."""

from collections.abc import Mapping

from megatron_qwen.data.order.apportion import Apportionment
from megatron_qwen.data.reading.held_out_rows import HeldOutRows
from megatron_qwen.data.reading.sample_fields import SampleFields
from megatron_qwen.data.reading.samples import ReadingOptions, Sample
from megatron_qwen.data.reading.sources import HeldOut, OpenSource
from megatron_qwen.errors import DataError, Problem


class HeldOutSamples:
    """Held-out samples of several sources, by weight.

    Args:
        parts: held-out windows or rows by source.
        weights: share of each source; those without held-out windows are left out.
        seq_length: tokens of a sample.
        fields: that the objective needs beside the tokens.
    """

    def __init__(
        self, parts: Mapping[str, HeldOut], weights: Mapping[str, float], seq_length: int, *, fields: SampleFields
    ) -> None:
        self.parts, self.seq_length, self._fields = dict(parts), seq_length, fields
        self.is_packed, self.extra_fields = any(part.is_packed for part in parts.values()), fields.fields
        self._names = sorted(parts)
        self._next = Apportionment([weights[name] for name in self._names])
        self._order: list[tuple[int, int]] = []

    @property
    def windows(self) -> int:
        """Windows held out, over all sources."""
        return sum(part.windows for part in self.parts.values())

    @property
    def names(self) -> list[str]:
        """The sources."""
        return self._names

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of an endless stream."""
        chosen, own = self._place(index)
        name = self._names[chosen]
        return self._fields.of(self.parts[name][own], name)

    def source_of(self, index: int) -> int:
        """Which of ``names`` sample ``index`` is of."""
        return self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        while index >= len(self._order):
            self._order.append(self._next.next())
        return self._order[index]


def held_out(
    sources: Mapping[str, OpenSource],
    *,
    seq_length: int,
    seed: int,
    reading: ReadingOptions,
    fraction: float,
    rows: bool = False,
) -> dict[str, HeldOut]:
    """The held-out samples of the sources that have any.

    Args:
        sources: of a stage.
        seq_length: tokens of a sample.
        seed: key of their order.
        reading: how they are read.
        fraction: share of the documents that is held out, for a message.
        rows: whether sources that are packed are so in validation, too; else all have windows over the text.

    Raises:
        DataError: none has.
    """
    found: dict[str, HeldOut] = {
        name: (HeldOutRows if rows and source.spec.packing == "best_fit" else HeldOut)(
            source, seq_length, seed + 1, reading
        )
        for name, source in sources.items()
        if source.documents < source.tokens.num_documents
    }
    full = {name: part for name, part in found.items() if part.windows}
    if not full:
        most = max(source.tokens.num_tokens - source.stop for source in sources.values())
        fix = (
            f"holds out {most} tokens, fewer than one sample of {seq_length + 1}; "
            "raise it or set training.eval_iters=0."
        )
        raise DataError(Problem("data.validation_fraction", fraction, fix))
    return full
