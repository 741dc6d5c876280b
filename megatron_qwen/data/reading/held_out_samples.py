"""The samples of a validation: held-out windows of all sources, by weight."""

from collections.abc import Mapping

from megatron_qwen.data.order.apportion import Apportionment
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample
from megatron_qwen.data.reading.sources import HeldOut


class HeldOutSamples:
    """Held-out samples of several sources, by weight.

    Args:
        parts: held-out windows by source.
        weights: share of each source; those without held-out windows are left out.
        seq_length: tokens of a sample.
    """

    is_packed = False
    extra_fields: tuple[ExtraField, ...] = ()

    def __init__(self, parts: Mapping[str, HeldOut], weights: Mapping[str, float], seq_length: int) -> None:
        self.parts, self.seq_length = dict(parts), seq_length
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
        return self.parts[self._names[chosen]][own]

    def source_of(self, index: int) -> int:
        """Which of ``names`` sample ``index`` is of."""
        return self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        while index >= len(self._order):
            self._order.append(self._next.next())
        return self._order[index]
