"""What a run trains on: stage after stage, sample by sample, with a ledger of what has been read.

Samples are numbered through the run. Which tokens sample ``i`` holds follows from the blend, the seed and the ledger,
whatever the layout. The ledger is a list of phases; a new one begins with every stage and with every change of the mix
or of the length, from where each source stands then. So a change repeats nothing and loses nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.config.blend import Blend, DataStage, read_blend, single_source
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.order import stream
from megatron_qwen.data.order.apportion import Apportionment
from megatron_qwen.data.order.phase import Phase, SourceOrder, SourcePosition
from megatron_qwen.data.reading.sample_reader import SampleReader
from megatron_qwen.data.reading.samples import ReadingOptions, Sample
from megatron_qwen.data.reading.sources import HeldOut, OpenSource, held_out, open_sources, require_room
from megatron_qwen.errors import ConfigError, DataError, Problem


@dataclass
class LedgerEntry:
    """A phase as the ledger keeps it.

    Args:
        stage: its name.
        seq_length: tokens of a sample.
        first_sample: number of its first sample in the run.
        samples: how many it gave.
        weights: share of each source.
        counts: samples that each source gave.
        reading: what else decides the text of a sample: cuts, masks, fill-in-the-middle.
        begins: where each source stood when it began.
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
        """Whether ``other`` is the same phase, further on."""
        mine = (self.stage, self.seq_length, self.weights, self.reading)
        return mine == (other.stage, other.seq_length, other.weights, other.reading)


class StageReader(SampleReader):
    """The samples of a phase, with the configuration that holds for them.

    Args:
        data: the run's data.
        stage: as the blend describes it.
        phase: the order.
        config: with what the stage changes.
        ends: number of the first sample that is no longer of the stage; None where it does not end.
        idle: where the sources stand that the phase does not read.
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
        super().__init__(data.sources, phase, reading=data.reading, lengths=stage.lengths, seed=data.seed)
        self.data, self.stage, self.config, self.ends, self.idle = data, stage, config, ends, dict(idle)

    def positions(self, consumed: int) -> dict[str, SourcePosition]:
        """Where every source stands once the run has taken samples up to ``consumed``."""
        return {**self.idle, **self.phase.positions(consumed - self.phase.first_sample)}

    def ledger_entry(self, consumed: int) -> LedgerEntry:
        """The phase, up to sample ``consumed``."""
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
        self.blend = blend_of(config)
        self.sources = open_sources(self.blend, config.data)
        self.reading = ReadingOptions(
            config.data.eod_mask_loss, config.data.reset_attention_mask, config.model.vocab_size
        )
        for stage in self.blend.stages:
            seq_length = stage.configure(config).data.seq_length
            for name in stage.weights:
                if self.sources[name].spec.packing == "windows":
                    require_room(self.sources[name], seq_length)
        self._orders = {name: order_of(source, self.seed) for name, source in self.sources.items()}
        self._known: dict[str, dict[str, Any]] = {}  # identities of the sources that the run has read
        self._closed: list[LedgerEntry] = []
        self.consumed = 0  # where the run began, or resumed
        # The phase under way, and those that a loader has looked ahead to.
        self._open = [self._begin(self.blend.stages[0], 0, {})]

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Takes the ledger of a checkpoint; where the blend has changed since, a new phase begins.

        Args:
            saved: what ``state`` gave.

        Raises:
            ConfigError: the blend misses the stage under way.
            DataError: a source has other tokens than those that the run has read.
        """
        self.consumed = sum(entry["samples"] for entry in saved["phases"])
        self._open = [self._restore(saved)]

    def at(self, consumed: int) -> StageReader:
        """The reader of the step that begins with sample ``consumed``; goes on to the next stage where it is due."""
        last = self._open[-1]
        names = [stage.name for stage in self.blend.stages]
        index = names.index(last.stage.name) + 1
        if last.ends is not None and consumed >= last.ends and index < len(names):
            self._open.append(self._begin(self.blend.stages[index], consumed, last.positions(consumed)))
        return next(reader for reader in reversed(self._open) if reader.phase.first_sample <= consumed)

    def latest(self, consumed: int) -> StageReader:
        """The reader of the step that ended with sample ``consumed - 1``; before the first step, of the first."""
        return self._begun(consumed)[-1]

    def validation_of(self, stage: DataStage) -> "ValidationSamples":
        """Held-out samples in the mix and at the length of a stage, as one sequence each.

        Raises:
            DataError: nothing is held out, or too little.
        """
        used = {name: self.sources[name] for name in stage.weights}
        seq_length = stage.configure(self.config).data.seq_length
        reading = ReadingOptions(self.reading.eod_mask_loss, False, self.reading.vocab_size)
        parts = held_out(
            used, seq_length=seq_length, seed=self.seed, reading=reading, fraction=self.config.data.validation_fraction
        )
        return ValidationSamples(parts, stage.weights, seq_length)

    def validation(self, reader: StageReader) -> "ValidationSamples":
        """Those of a reader's stage."""
        return self.validation_of(reader.stage)

    def ledger(self, consumed: int) -> list[LedgerEntry]:
        """The ledger: every phase up to sample ``consumed``."""
        begun = self._begun(consumed)
        ends = [reader.phase.first_sample for reader in begun[1:]] + [consumed]
        return [*self._closed, *(reader.ledger_entry(end) for reader, end in zip(begun, ends, strict=True))]

    def forget(self, consumed: int) -> None:
        """Lets go of the order of samples before ``consumed``: they are not asked for again."""
        begun = self._begun(consumed)
        self._closed = self.ledger(consumed)[:-1]
        self._known |= {name: self._identity(name) for reader in begun[:-1] for name in reader.stage.weights}
        self._open = self._open[len(begun) - 1 :]
        phase = self._open[0].phase
        phase.forget(consumed - phase.first_sample)

    def state(self, consumed: int) -> dict[str, Any]:
        """The ledger for a checkpoint's state."""
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
        """Whether a stage's samples may hold independent sequences."""
        packs = any(self.sources[name].spec.packing == "best_fit" for name in stage.weights)
        return bool(stage.lengths) or packs or self.reading.reset_attention_mask

    def reading_of(self, stage: DataStage) -> dict[str, Any]:
        """What decides the text of a stage's samples beside their tokens, for the ledger."""
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
            fix = f"is the stage under way, and the blend has only {', '.join(stages)}; keep its name."
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


class ValidationSamples:
    """Held-out samples of several sources, by weight.

    Args:
        parts: held-out windows by source.
        weights: share of each source; those without held-out windows are left out.
        seq_length: tokens of a sample.
    """

    is_packed = False

    def __init__(self, parts: Mapping[str, HeldOut], weights: Mapping[str, float], seq_length: int) -> None:
        self.parts, self.seq_length = dict(parts), seq_length
        self._names = sorted(parts)
        self._next = Apportionment([weights[name] for name in self._names])
        self._order: list[tuple[int, int]] = []

    @property
    def windows(self) -> int:
        """Windows held out, over all sources."""
        return sum(part.windows for part in self.parts.values())

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of an endless stream."""
        while index >= len(self._order):
            self._order.append(self._next.next())
        chosen, own = self._order[index]
        return self.parts[self._names[chosen]][own]


def blend_of(config: RunConfig) -> Blend:
    """The blend that data.blend names, or that of the single source data.path.

    Raises:
        ConfigError: the blend file is wrong.
        DataError: neither is given.
    """
    if config.data.blend is not None:
        return read_blend(Path(config.data.blend))
    if config.data.path is None:
        raise DataError(Problem("data.path", "null", "must name a token file (`mq data prepare` makes one)."))
    return single_source(config.data.path)


def order_of(source: OpenSource, seed: int, noted: Mapping[str, Any] | None = None) -> SourceOrder:
    """What decides a source's order; the sizes that a run began with (``noted``) stay, whatever is usual now."""
    if source.spec.packing == "best_fit":
        return SourceOrder(None, source.packable(seed))
    layout = source.stream_layout(seed)
    if noted is not None:
        layout = stream.StreamLayout(layout.total, noted["block"], noted["group"], layout.key)
    return SourceOrder(layout, None)


def require_same(noted: Mapping[str, Mapping[str, Any]], sources: Mapping[str, OpenSource]) -> None:
    """Raises DataError where a source is not what the run has read under its name."""
    problems = []
    for name in sorted(set(noted) & set(sources)):
        before, now = noted[name], sources[name].identity()
        for key in ("packing", "tokens", "documents", "digest"):
            if before[key] != now[key] and None not in (before[key], now[key]):
                fix = (
                    f"the run has read it with {key} = {before[key]}: its place there means nothing here. Give what "
                    "has changed a name of its own, or use the old files and settings."
                )
                problems.append(Problem(f"source {name}: {key}", now[key], fix))
                break
    if problems:
        raise DataError(problems)
