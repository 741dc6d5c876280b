"""The samples that a run has read, found again from its ledger alone."""

from collections.abc import Mapping
from typing import Any

from megatron_qwen.config.blend import SourceSpec
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.order.phase import Phase, Position
from megatron_qwen.data.reading.sample_reader import SampleReader
from megatron_qwen.data.reading.samples import Reading, Run, Sample
from megatron_qwen.data.reading.sources import OpenSource, open_source
from megatron_qwen.data.reading.training_data import Record, order_of, require_same
from megatron_qwen.errors import ConfigError, Problem


class Replay:
    """A run's samples, whatever its blend is by now.

    Args:
        config: of the run; the share held out for validation is read.
        ledger: what ``TrainingData.state`` gave for its newest checkpoint.
    """

    def __init__(self, config: RunConfig, ledger: Mapping[str, Any]) -> None:
        self.config, self.ledger = config, ledger
        self.records = [Record(**record) for record in ledger["phases"]]
        self._sources: dict[str, OpenSource] = {}
        self._reader: tuple[int, SampleReader] | None = None

    def __getitem__(self, sample: int) -> tuple[str, list[Run], Sample]:
        """A sample by its number in the run: its source, the runs [a, b) of the source's tokens, and the sample.

        Raises:
            ConfigError: the ledger does not reach so far.
            DataError: the source's files are gone, or hold other tokens than those that the run has read.
        """
        for record in self.records:
            if record.first_sample <= sample < record.first_sample + record.samples:
                return self._reader_of(record).traced(sample)
        raise ConfigError(Problem("sample", sample, "lies beyond the ledger of the newest checkpoint."))

    def source(self, name: str) -> OpenSource:
        """A source as the run has read it."""
        if name not in self._sources:
            noted = self.ledger["sources"][name]
            spec = SourceSpec(path=noted["path"], packing=noted["packing"])
            source = open_source(name, spec, fraction=self.config.data.validation_fraction)
            require_same({name: noted}, {name: source})
            self._sources[name] = source
        return self._sources[name]

    def _reader_of(self, record: Record) -> SampleReader:
        if self._reader is None or self._reader[0] != record.first_sample:
            fim = record.reading["fim"]
            sources = {}
            for name in record.weights:
                opened = self.source(name)
                rate, spm = fim.get(name, (0.0, 0.0))
                spec = SourceSpec(path=opened.spec.path, packing=opened.spec.packing, fim_rate=rate, fim_spm_rate=spm)
                sources[name] = OpenSource(name, spec, opened.tokens, opened.documents, opened.stop)
            seed = self.ledger["seed"]
            noted = self.ledger["sources"]
            phase = Phase(
                {name: order_of(source, seed, noted[name]) for name, source in sources.items()},
                record.weights,
                seq_length=record.seq_length,
                first_sample=record.first_sample,
                begins={name: Position.restored(position) for name, position in record.begins.items()},
            )
            reading = Reading(record.reading["eod_mask_loss"], record.reading["reset_attention_mask"])
            lengths = {int(length): share for length, share in record.reading["lengths"].items()}
            self._reader = (
                record.first_sample,
                SampleReader(sources, phase, reading=reading, lengths=lengths, seed=seed),
            )
        return self._reader[1]
