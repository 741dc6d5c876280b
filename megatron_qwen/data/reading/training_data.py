"""The training data of a run: data stages, samples by number, and the ledger of what has been read.

Samples are numbered over the whole run. Which tokens sample ``i`` holds is a function of blend, seed and ledger. It
does not depend on the parallel layout or the number of restarts. The batch size decides only where a data stage ends.

The ledger is a list of phases. A phase is a stretch with one mix of sources at one sequence length; it records how many
samples it gave, how many of each source, and the position of every source at its beginning. A new phase starts with
every data stage, and with every change of the mix or the length, at the positions where the last one ended. So a change
neither repeats nor skips a token.

Example, a checkpoint after 1,500 samples of which the first 1,000 had 4,096 tokens:

    phase 0: stage "main", seq_length 4096, samples 0 - 999,     web 800, code 200
    phase 1: stage "long", seq_length 32768, samples 1000 - 1499, web 250, code 250, begins where phase 0 ended
    positions: of web and code after sample 1499

A resume needs only the last phase and the positions. ``replay.py`` finds every earlier sample from the phases.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_qwen.config.blend import DataStage
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.order import packing, stream
from megatron_qwen.data.order.phase import Phase, SourceOrder, SourcePosition
from megatron_qwen.data.reading.conversations import require_pairs_or_none, require_reference, require_whole
from megatron_qwen.data.reading.held_out_samples import HeldOutSamples, held_out
from megatron_qwen.data.reading.pair_fields import Reference
from megatron_qwen.data.reading.run_blend import blend_of
from megatron_qwen.data.reading.sample_fields import SampleFields, sample_fields
from megatron_qwen.data.reading.sample_reader import SampleReader
from megatron_qwen.data.reading.samples import ReadingOptions
from megatron_qwen.data.reading.sources import OpenSource, open_model_sources, require_room
from megatron_qwen.errors import ConfigError, DataError, Problem

# Rows whose padding is counted for an estimate. They are a random part of a pool, so their mean is within a few percent
# of that of all rows; to pack the pool takes under 0.1 s. Chosen by hand.
_ROWS_COUNTED = 1024


@dataclass
class LedgerEntry:
    """A phase in the ledger.

    Args:
        stage: name of its data stage.
        seq_length: tokens of a sample.
        first_sample: number of its first sample in the run.
        samples: how many samples it has given.
        weights: share of each source.
        counts: how many of them each source gave.
        reading: what else determines a sample: lengths of packed sequences, masks, fill-in-the-middle.
        begins: position of each source at its beginning.
    """

    stage: str
    seq_length: int
    first_sample: int
    samples: int
    weights: dict[str, float]
    counts: dict[str, int]
    reading: dict[str, Any]
    begins: dict[str, dict[str, Any]]

    def continues(self, other: "LedgerEntry") -> bool:
        """Whether ``other`` is a later state of the same phase."""
        mine = (self.stage, self.seq_length, self.weights, self.reading)
        return mine == (other.stage, other.seq_length, other.weights, other.reading)


class StageReader(SampleReader):
    """The samples of a phase, with the configuration in force.

    Args:
        data: the run's data.
        stage: as the blend describes it.
        phase: the order.
        config: the run's configuration with the changes of the stage.
        ends: number of the first sample after the stage; None if the stage lasts to the end of the run.
        idle: positions of the sources that the phase does not read.
    """

    def __init__(
        self,
        data: "TrainingData",
        stage: DataStage,
        phase: Phase,
        *,
        config: RunConfig,
        ends: int | None,
        idle: Mapping[str, SourcePosition],
    ) -> None:
        super().__init__(
            data.sources, phase, reading=data.reading, lengths=stage.lengths, seed=data.seed, fields=data.fields
        )
        self.data, self.stage, self.config, self.ends, self.idle = data, stage, config, ends, dict(idle)

    def positions(self, consumed: int) -> dict[str, SourcePosition]:
        """Position of every source after sample ``consumed - 1``."""
        return {**self.idle, **self.phase.positions(consumed - self.phase.first_sample)}

    def ledger_entry(self, consumed: int) -> LedgerEntry:
        """The phase as a ledger entry, up to sample ``consumed - 1``."""
        phase, samples = self.phase, consumed - self.phase.first_sample
        return LedgerEntry(
            stage=self.stage.name,
            seq_length=phase.seq_length,
            first_sample=phase.first_sample,
            samples=samples,
            weights=phase.weights,
            counts=phase.counts(samples),
            reading=self.data.reading_of(self.stage),
            begins={name: position.as_dict() for name, position in phase.begins.items()},
        )


class TrainingData:
    """Training and validation samples of a run.

    Args:
        config: the run; data.path or data.blend names the tokens.

    Raises:
        ConfigError: the blend file is wrong.
        DataError: token files are missing, damaged or too small.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.seed = config, config.training.seed
        self.fields: SampleFields = sample_fields(config)
        self.extra_fields = self.held_out_fields = self.fields.fields
        self.blend = blend_of(config)
        self.sources = open_model_sources(self.blend, config.data)
        self.reading = ReadingOptions(
            config.data.eod_mask_loss, config.data.reset_attention_mask, config.model.vocab_size
        )
        for stage in self.blend.stages:
            seq_length = stage.configure(config).data.seq_length
            for name in stage.weights:
                if self.sources[name].spec.packing == "windows":
                    require_room(self.sources[name], seq_length)
        require_pairs_or_none(self.sources, config)
        require_reference(self.blend, config)
        if config.objective.kind != "pretrain":
            require_whole(self.sources, self.blend, config)
        self._orders = {name: order_of(source, self.seed) for name, source in self.sources.items()}
        self._row_tokens: dict[tuple[str, int], float] = {}
        self._known: dict[str, dict[str, Any]] = {}  # identities of the sources that closed phases have read
        self._closed: list[LedgerEntry] = []
        self.consumed = 0  # samples of earlier attempts
        # The current phase, and later ones that the loader has read ahead into. A checkpoint may be written while it is
        # ahead: the ledger must not contain what only the loader has read.
        self._open = [self._begin(self.blend.stages[0], 0, {})]

    def know(self, references: Mapping[str, Reference]) -> None:
        """From now on samples have what a reference model thinks of their answers.

        Args:
            references: sums of log-probabilities by source, [documents, 2].
        """
        self.fields = sample_fields(self.config, references)
        for reader in self._open:
            reader.fields = self.fields

    @property
    def ends_of_turn(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, as the manifests of its conversations say."""
        ends = {source.chat.get("end_of_turn") for source in self.sources.values()}
        return tuple(sorted(end for end in ends if end is not None))

    @property
    def loss_unit(self) -> int:
        """Such a part of 1 is the least weight of a token's loss; 1 where tokens have loss or none."""
        return max(source.tokens.loss_unit for source in self.sources.values())

    @property
    def turn_tokens(self) -> dict[str, int]:
        """Ids of the control tokens that begin and end answers, by name."""
        return {
            name: index
            for source in self.sources.values()
            for name, index in source.chat.get("turn_tokens", {}).items()
        }

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Continues from the ledger of a checkpoint. If the blend has changed since, a new phase begins.

        Args:
            saved: the result of ``state``.

        Raises:
            ConfigError: the blend lacks the current stage.
            DataError: a source does not have the tokens that the run has read.
        """
        self.consumed = sum(entry["samples"] for entry in saved["phases"])
        self._open = [self._restore(saved)]

    def at(self, consumed: int) -> StageReader:
        """The reader of the step that starts with sample ``consumed``; starts the next stage if it is due."""
        last = self._open[-1]
        names = [stage.name for stage in self.blend.stages]
        index = names.index(last.stage.name) + 1
        if last.ends is not None and consumed >= last.ends and index < len(names):
            self._open.append(self._begin(self.blend.stages[index], consumed, last.positions(consumed)))
        return next(reader for reader in reversed(self._open) if reader.phase.first_sample <= consumed)

    def tokens_per_sample(self, name: str, seq_length: int) -> float:
        """Tokens of a source in a sample of a length, padding left out; of packed rows the mean of the first ones."""
        documents = self._orders[name].documents
        if documents is None:  # windows have no padding
            return float(seq_length)
        if (name, seq_length) not in self._row_tokens:
            rows = packing.PackedRows(documents, packing.BEGINNING, seq_length=seq_length, ordinal=0)
            tokens = sum(end - begin for index in range(_ROWS_COUNTED) for begin, end in rows[index])
            self._row_tokens[name, seq_length] = tokens / _ROWS_COUNTED
        return self._row_tokens[name, seq_length]

    def latest(self, consumed: int) -> StageReader:
        """The reader of the step that ended with sample ``consumed - 1``; before the first step, the first reader."""
        return self._begun(consumed)[-1]

    def validation_of(self, stage: DataStage) -> HeldOutSamples:
        """Held-out samples in the mix and at the length of a stage, one sequence per sample.

        Raises:
            DataError: nothing is held out, or too little.
        """
        used = {name: self.sources[name] for name in stage.weights}
        seq_length = stage.configure(self.config).data.seq_length
        reading = ReadingOptions(self.reading.eod_mask_loss, False, self.reading.vocab_size)
        parts = held_out(
            used,
            seq_length=seq_length,
            seed=self.seed,
            reading=reading,
            fraction=self.config.data.validation_fraction,
            rows=self.config.objective.kind != "pretrain",
        )
        return HeldOutSamples(parts, stage.weights, seq_length, fields=self.fields)

    def validation(self, reader: StageReader) -> HeldOutSamples:
        """Held-out samples of a reader's stage."""
        return self.validation_of(reader.stage)

    def ledger(self, consumed: int) -> list[LedgerEntry]:
        """The ledger up to sample ``consumed - 1``: one entry per phase."""
        begun = self._begun(consumed)
        ends = [reader.phase.first_sample for reader in begun[1:]] + [consumed]
        return [*self._closed, *(reader.ledger_entry(end) for reader, end in zip(begun, ends, strict=True))]

    def forget(self, consumed: int) -> None:
        """Frees the order of samples before ``consumed``, which are not read again; closes finished phases."""
        begun = self._begun(consumed)
        self._closed = self.ledger(consumed)[:-1]
        self._known |= {name: self._identity(name) for reader in begun[:-1] for name in reader.stage.weights}
        self._open = self._open[len(begun) - 1 :]
        phase = self._open[0].phase
        phase.forget(consumed - phase.first_sample)

    def state(self, consumed: int) -> dict[str, Any]:
        """The ledger, positions and identities of the sources, for state.json of a checkpoint."""
        begun = self._begun(consumed)
        identities = {name: self._identity(name) for reader in begun for name in reader.stage.weights}
        positions = begun[-1].positions(consumed)
        return {
            "seed": self.seed,
            "sources": {**self._known, **identities},
            "positions": {name: position.as_dict() for name, position in sorted(positions.items())},
            "phases": [asdict(entry) for entry in self.ledger(consumed)],
        }

    def _begun(self, consumed: int) -> list[StageReader]:
        """The open phases that have given a sample, or the first."""
        return [reader for reader in self._open if reader.phase.first_sample < consumed] or self._open[:1]

    def _begin(self, stage: DataStage, first_sample: int, positions: Mapping[str, SourcePosition]) -> StageReader:
        config = stage.configure(self.config)
        length = config.data.seq_length
        begins = {
            name: positions.get(name, SourcePosition()).cut(self._orders[name], length)
            for name in sorted(stage.weights)
        }
        phase = Phase(self._orders, stage.weights, seq_length=length, first_sample=first_sample, begins=begins)
        return self._reader(stage, phase, positions)

    def _reader(self, stage: DataStage, phase: Phase, positions: Mapping[str, SourcePosition]) -> StageReader:
        return StageReader(
            self,
            stage,
            phase,
            config=stage.configure(self.config),
            ends=self._ends(stage, phase.first_sample, phase.seq_length),
            idle={name: position for name, position in positions.items() if name not in phase.begins},
        )

    def _ends(self, stage: DataStage, first_sample: int, seq_length: int) -> int | None:
        if stage.tokens is None:
            return None
        used = sum(entry.samples * entry.seq_length for entry in self._closed if entry.stage == stage.name)
        return first_sample + max(-(-(stage.tokens - used) // seq_length), 0)

    def is_packed(self, stage: DataStage) -> bool:
        """Whether samples of a stage may hold several independent sequences (packed batches)."""
        packs = any(self.sources[name].spec.packing == "best_fit" for name in stage.weights)
        return bool(stage.lengths) or packs or self.reading.reset_attention_mask

    def reading_of(self, stage: DataStage) -> dict[str, Any]:
        """What determines a stage's samples besides their tokens, for the ledger."""
        fim = {
            name: [self.blend.sources[name].fim_rate, self.blend.sources[name].fim_spm_rate]
            for name in sorted(stage.weights)
            if self.blend.sources[name].fim_rate
        }
        return {
            "lengths": {str(length): share for length, share in stage.lengths.items()},
            "eod_mask_loss": self.reading.eod_mask_loss,
            "reset_attention_mask": self.reading.reset_attention_mask,
            "fim": fim,
        }

    def _identity(self, name: str) -> dict[str, Any]:
        layout = self._orders[name].windows
        sizes = {} if layout is None else {"block": layout.block, "group": layout.group}
        return {**self.sources[name].identity(), **sizes}

    def _restore(self, saved: Mapping[str, Any]) -> StageReader:
        require_same(saved["sources"], self.sources)
        self._known = dict(saved["sources"])
        for name in set(self._known) & set(self.sources):
            self._orders[name] = order_of(self.sources[name], self.seed, self._known[name])
        *self._closed, last = [LedgerEntry(**entry) for entry in saved["phases"]]
        stages = {stage.name: stage for stage in self.blend.stages}
        if last.stage not in stages:
            fix = f"is the current stage of the run, but the blend has only {', '.join(stages)}; keep its name."
            raise ConfigError(Problem("data.blend: stages", last.stage, fix))
        stage = stages[last.stage]
        positions = {name: SourcePosition.restored(position) for name, position in saved["positions"].items()}
        consumed = last.first_sample + last.samples
        length = stage.configure(self.config).data.seq_length
        fresh = LedgerEntry(stage.name, length, consumed, 0, dict(stage.weights), {}, self.reading_of(stage), {})
        if not last.continues(fresh):
            if last.samples:
                self._closed.append(last)
            return self._begin(stage, consumed, positions)
        begins = {name: SourcePosition.restored(position) for name, position in last.begins.items()}
        phase = Phase(
            self._orders,
            stage.weights,
            seq_length=length,
            first_sample=last.first_sample,
            begins=begins,
            counts=last.counts,
            resumed=positions,
        )
        return self._reader(stage, phase, positions)


def order_of(source: OpenSource, seed: int, noted: Mapping[str, Any] | None = None) -> SourceOrder:
    """The order of a source. Sizes in the ledger (``noted``) win: a later version may choose others for new runs."""
    if source.spec.packing == "best_fit":
        return SourceOrder(None, source.packable(seed))
    layout = source.stream_layout(seed)
    if noted is not None:
        layout = stream.StreamLayout(layout.total, noted["block"], noted["group"], layout.key)
    return SourceOrder(layout, None)


def require_same(noted: Mapping[str, Mapping[str, Any]], sources: Mapping[str, OpenSource]) -> None:
    """Raises DataError if a source differs from what the run has read under its name.

    A position in the ledger is a position in these exact tokens: in other files it would select other text.
    """
    problems = []
    for name in sorted(set(noted) & set(sources)):
        before, now = noted[name], sources[name].identity()
        for key in ("packing", "tokens", "documents", "digest"):
            if before[key] != now[key] and None not in (before[key], now[key]):
                fix = (
                    f"the run has read it with {key} = {before[key]}, so the position in it is not valid any more. "
                    "Give the changed source another name, or use the old files and settings."
                )
                problems.append(Problem(f"source {name}: {key}", now[key], fix))
                break
    if problems:
        raise DataError(problems)
