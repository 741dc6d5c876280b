"""Finds the samples that a run has read, from its ledger alone."""

from collections.abc import Mapping
from typing import Any

from megatron_qwen.config.blend import SourceSpec
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.order.phase import Phase, SourcePosition
from megatron_qwen.data.order.stream import TokenSpan
from megatron_qwen.data.reading.averages import AverageFields
from megatron_qwen.data.reading.sample_reader import SampleReader
from megatron_qwen.data.reading.samples import ReadingOptions, Sample
from megatron_qwen.data.reading.sources import OpenSource, open_model_source
from megatron_qwen.data.reading.training_data import LedgerEntry, order_of, require_same
from megatron_qwen.errors import ConfigError, Problem


class Replay:
    """The samples that a run has read, independent of its present blend.

    Args:
        config: of the run; the share held out for validation is read.
        ledger: what ``TrainingData.state`` gave for its newest checkpoint.
    """

    def __init__(self, config: RunConfig, ledger: Mapping[str, Any]) -> None:
        self.config, self.ledger = config, ledger
        self.entries = [LedgerEntry(**entry) for entry in ledger["phases"]]
        self._sources: dict[str, OpenSource] = {}
        self._reader: tuple[int, SampleReader] | None = None

    def __getitem__(self, sample: int) -> tuple[str, list[TokenSpan], Sample]:
        """A sample by its number in the run: its source, the spans [a, b) of the source's tokens, and the sample.

        Raises:
            ConfigError: the ledger ends before this sample.
            DataError: the source's files are missing, or contain other tokens than the run has read.
        """
        for entry in self.entries:
            if entry.first_sample <= sample < entry.first_sample + entry.samples:
                return self._reader_of(entry).traced(sample)
        raise ConfigError(Problem("sample", sample, "is beyond the ledger of the newest checkpoint."))

    def source(self, name: str) -> OpenSource:
        """A source as the run has read it."""
        if name not in self._sources:
            noted = self.ledger["sources"][name]
            spec = SourceSpec(path=noted["path"], packing=noted["packing"])
            source = open_model_source(name, spec, fraction=self.config.data.validation_fraction)
            require_same({name: noted}, {name: source})
            self._sources[name] = source
        return self._sources[name]

    def _reader_of(self, entry: LedgerEntry) -> SampleReader:
        if self._reader is None or self._reader[0] != entry.first_sample:
            fim = entry.reading["fim"]
            sources = {}
            for name in entry.weights:
                opened = self.source(name)
                rate, spm = fim.get(name, (0.0, 0.0))
                spec = SourceSpec(path=opened.spec.path, packing=opened.spec.packing, fim_rate=rate, fim_spm_rate=spm)
                sources[name] = OpenSource(name, spec, opened.tokens, opened.documents, opened.stop)
            seed = self.ledger["seed"]
            noted = self.ledger["sources"]
            phase = Phase(
                {name: order_of(source, seed, noted[name]) for name, source in sources.items()},
                entry.weights,
                seq_length=entry.seq_length,
                first_sample=entry.first_sample,
                begins={name: SourcePosition.restored(position) for name, position in entry.begins.items()},
            )
            reading = ReadingOptions(entry.reading["eod_mask_loss"], entry.reading["reset_attention_mask"])
            lengths = {int(length): share for length, share in entry.reading["lengths"].items()}
            self._reader = (
                entry.first_sample,
                SampleReader(sources, phase, reading=reading, lengths=lengths, seed=seed, fields=AverageFields()),
            )
        return self._reader[1]
