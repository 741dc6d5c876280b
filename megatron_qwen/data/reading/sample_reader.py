"""Reads the samples of a phase, by their number in the run."""

import zlib
from collections.abc import Mapping

from megatron_qwen.data.order.phase import Phase
from megatron_qwen.data.order.stream import TokenSpan
from megatron_qwen.data.reading.sample_fields import SampleFields
from megatron_qwen.data.reading.samples import ReadingOptions, Sample, cut
from megatron_qwen.data.reading.sources import OpenSource

# 2**64 / golden ratio. Its multiples modulo 2**64 are evenly spread (Fibonacci hashing), so every prefix of a source's
# samples has close to the right share of each length.
_GOLDEN = 0x9E3779B97F4A7C15


class SampleReader:
    """Reads the tokens that a phase assigns to a sample, and builds the sample.

    Args:
        sources: that the phase draws from, by name.
        phase: the order.
        reading: how samples are made of tokens.
        lengths: share of the samples that is cut into independent sequences of each length; empty cuts none.
        seed: of the run.
        fields: that the objective needs beside the tokens.
    """

    def __init__(
        self,
        sources: Mapping[str, OpenSource],
        phase: Phase,
        *,
        reading: ReadingOptions,
        lengths: Mapping[int, float],
        seed: int,
        fields: SampleFields,
    ) -> None:
        self.fields, self.extra_fields = fields, fields.fields
        self.sources, self.phase, self.reading, self.lengths, self.seed = sources, phase, reading, lengths, seed
        self.seq_length = phase.seq_length
        packs = any(sources[name].spec.packing == "best_fit" for name in phase.names)
        self.is_packed = bool(lengths) or packs or reading.reset_attention_mask

    def __getitem__(self, sample: int) -> Sample:
        """Sample ``sample`` of the run."""
        return self.traced(sample)[2]

    def traced(self, sample: int) -> tuple[str, list[TokenSpan], Sample]:
        """A sample with the source it comes from and the spans [a, b) of that source's tokens."""
        name, number, spans = self.phase[sample]
        key = (self.seed, zlib.crc32(name.encode()), self.phase.begins[name].ordinal, number)
        read = self.sources[name].read(spans, seq_length=self.seq_length, reading=self.reading, key=key)
        length = self._length(key)
        whole = read if length == self.seq_length else cut(read, length)
        return name, spans, self.fields.of(whole, name)

    def _length(self, key: tuple[int, ...]) -> int:
        """Length of the independent sequences in a sample; over the samples of a source each length has its share."""
        length = self.seq_length
        at = ((key[0] ^ key[1]) + key[3]) * _GOLDEN % (1 << 64) / (1 << 64)
        for length, share in self.lengths.items():
            if at < share:
                return length
            at -= share
        return length
