"""A blend file: the sources of a run's data, and the stages in which they are read.

```yaml
sources:
  web:  {path: web/corpus}
  code: {path: code/corpus, fim_rate: 0.5}
stages:
  - {name: main, tokens: 900B, seq_length: 4096, rotary_base: 10000, weights: {web: 0.8, code: 0.2}}
  - {name: long, budgets: {web: 60B, code: 40B}, seq_length: 32768, rotary_base: 1000000,
     lengths: {32768: 0.4, 8192: 0.6}}
```
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_qwen.config.fields import Bounds, Form
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import did_you_mean

_Part = Annotated[float, Bounds(minimum=0, maximum=1)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT])", re.IGNORECASE)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Up to four epochs a repeated token is worth nearly a fresh one (Muennighoff et al. 2023, arXiv 2305.16264).
_MAX_EPOCHS = 4.0
# The source of a run that names a single token file.
SINGLE = "data"


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of text.

    Args:
        path: prefix of a token file or of a set.
        packing: ``windows`` over the stream of documents, or ``best_fit`` of whole documents.
        fim_rate: fraction of documents rearranged for fill-in-the-middle (arXiv 2207.14255).
        fim_spm_rate: fraction of those in suffix-prefix-middle order; the others are in prefix-suffix-middle order.
        max_epochs: a plan that repeats the source more often than this gives a warning.
    """

    path: str
    packing: Literal["windows", "best_fit"] = "windows"
    fim_rate: _Part = 0.0
    fim_spm_rate: _Part = 0.5
    max_epochs: Annotated[float, Bounds(minimum=0, finite=False)] = _MAX_EPOCHS


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """A part of the run with one mix of sources and one sequence length.

    Args:
        name: unique in the file; a resumed run finds its stage by this name.
        weights: share of each source, adding up to one.
        tokens: how long it lasts; None, in the last stage, to the end of the run.
        seq_length: tokens of a sample; None is data.seq_length.
        rotary_base: RoPE base; None is rope.base.
        lengths: share of the samples that are packed from sequences of each length, which do not attend to one another;
            empty packs none.
        global_batch_size: samples of a step; None is training.global_batch_size.
        micro_batch_size: None is training.micro_batch_size.
    """

    name: str
    weights: dict[str, float]
    tokens: int | None = None
    seq_length: int | None = None
    rotary_base: float | None = None
    lengths: dict[int, float] = field(default_factory=dict)
    global_batch_size: int | None = None
    micro_batch_size: int | None = None

    def configure(self, config: RunConfig) -> RunConfig:
        """The configuration that holds while the stage lasts."""
        if self.seq_length is not None:
            config = config.with_section("data", seq_length=self.seq_length)
        if self.rotary_base is not None:
            config = config.with_section("rope", base=self.rotary_base)
        changes = {
            name: getattr(self, name)
            for name in ("global_batch_size", "micro_batch_size")
            if getattr(self, name) is not None
        }
        if self.global_batch_size is not None:
            changes["rampup_batch_size"] = None
        return config.with_section("training", **changes) if changes else config


@dataclass(frozen=True)
class Blend:
    """Sources by name, and stages in order."""

    sources: dict[str, SourceSpec]
    stages: tuple[DataStage, ...]

    def as_dict(self) -> dict[str, Any]:
        """As a blend file says it, paths in full."""
        return {
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "stages": [
                {name: value for name, value in asdict(stage).items() if value not in (None, {})}
                for stage in self.stages
            ],
        }


def stage_configs(config: RunConfig) -> list[RunConfig]:
    """One configuration for each stage that a run reaches, with the steps of the stage as training.train_iters.

    Args:
        config: of the run. The batch ramp-up is ignored: every step has the full batch.

    Raises:
        ConfigError: the blend file is wrong.
    """
    if config.data.blend is None:
        return [config]
    stages, left = read_blend(Path(config.data.blend)).stages, config.training.train_iters
    found = []
    for index, stage in enumerate(stages):
        own = stage.configure(config)
        tokens_per_step = own.training.global_batch_size * own.data.seq_length
        last = index + 1 == len(stages) or stage.tokens is None
        steps = left if last else min(left, -(-(stage.tokens or 0) // tokens_per_step))
        if steps:
            found.append(own.with_section("training", train_iters=steps))
        left -= steps
    return found


def single_source(path: str, *, packing: Literal["windows", "best_fit"] = "windows") -> Blend:
    """The blend of a run that names one token file."""
    return Blend({SINGLE: SourceSpec(path=path, packing=packing)}, (DataStage(name=SINGLE, weights={SINGLE: 1.0}),))


def read_blend(path: Path) -> Blend:
    """Reads a blend file; relative paths in it start at the directory of the file.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    content, reader = read_mapping(path), YamlReader(str(path))
    file = reader.read(_BlendFile, content)
    assert file is not None
    if not content.get("sources"):
        reader.wrong("sources", None, "must name at least one source: a mapping from source name to its fields.")
    if not content.get("stages"):
        reader.wrong("stages", None, "must be a list of at least one stage.")
    if file.stages:
        _check_stages(reader, content, file.stages)
    reader.raise_problems()
    folder = path.parent.absolute()
    sources = {
        name: source if "://" in source.path else replace(source, path=str(folder / source.path))
        for name, source in file.sources.items()
    }
    return Blend(sources, tuple(map(_stage, file.stages)))


def amount(value: object) -> float | None:
    """A number, or text such as ``300B`` (K, M, B, T in thousands); None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < float("inf") else None
    if isinstance(value, str) and (match := _AMOUNT.fullmatch(value.strip())):
        return float(match[1]) * _UNITS[match[2].upper()]
    return None


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError
    return value


def _share(value: object) -> float:
    number = amount(value)
    if number is None or number <= 0:
        raise ValueError
    return number


def _tokens(value: object) -> int:
    number = amount(value)
    if number is None or number < 1:
        raise ValueError
    return int(number)


_Name = Annotated[str, Form("letters, digits, '.', '_' and '-', at most 100, the first a letter or digit", _name)]
_Shares = dict[str, Annotated[float, Form("a number above 0", _share)]]
_Count = Annotated[int, Bounds(minimum=1)]


@dataclass(frozen=True, kw_only=True)
class _StageEntry:
    """A stage as the file has it; see ``DataStage``."""

    name: _Name
    weights: _Shares | None = None
    budgets: _Shares | None = None
    tokens: Annotated[int, Form("a number of tokens, such as 300B", _tokens)] | None = None
    seq_length: Annotated[int, Bounds(minimum=2)] | None = None
    rotary_base: Annotated[float, Bounds(minimum=1)] | None = None
    lengths: dict[_Count, Annotated[float, Form("a number above 0", _share)]] = field(default_factory=dict)
    global_batch_size: _Count | None = None
    micro_batch_size: _Count | None = None


@dataclass(frozen=True, kw_only=True)
class _BlendFile:
    sources: dict[_Name, SourceSpec] = field(default_factory=dict)
    stages: tuple[_StageEntry, ...] = ()


def _check_stages(reader: YamlReader, content: Mapping[str, Any], stages: Sequence[_StageEntry]) -> None:
    """Notes what is wrong with stages together, with their sources, and with their fields together."""
    sources = content.get("sources")
    known = [str(name) for name in sources] if isinstance(sources, dict) else []
    names = [stage.name for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        reader.wrong(
            "stages",
            name,
            "two stages have this name; names must be unique, because a resumed run finds its stage by name.",
        )
    for index, (stage, body) in enumerate(zip(stages, content["stages"], strict=True)):
        where = f"stages[{index}]"
        _check_mix(reader, where, body, stage, known)
        if index < len(stages) - 1 and body.get("tokens") is None and body.get("budgets") is None:
            reader.wrong(f"{where}.tokens", None, "must be set in every stage except the last.")
        if stage.lengths and body.get("seq_length") is None:
            reader.wrong(f"{where}.lengths", None, "requires seq_length in the same stage.")
        if (seq_length := stage.seq_length) is not None:
            for length in stage.lengths:
                if length >= 1 and seq_length % length:
                    fix = f"must divide the stage's seq_length = {seq_length} without remainder."
                    reader.wrong(f"{where}.lengths", length, fix)


def _check_mix(
    reader: YamlReader, where: str, body: Mapping[str, Any], stage: _StageEntry, sources: Sequence[str]
) -> None:
    given = [key for key in ("weights", "budgets") if body.get(key) is not None]
    shares = getattr(stage, given[0]) if len(given) == 1 else None
    if len(given) != 1 or shares == {}:
        reader.wrong(where, None, "must set either weights (shares) or budgets (tokens) for its sources, not both.")
    for name in shares or ():
        if sources and name not in sources:
            reader.wrong(f"{where}.{given[0]}.{name}", None, f"no such source.{did_you_mean(name, sources)}")
    if stage.budgets and stage.tokens is not None and stage.tokens != (total := sum(stage.budgets.values())):
        reader.wrong(
            f"{where}.tokens", body["tokens"], f"must equal the sum of the budgets, {total:,.0f}; change or remove it."
        )


def _stage(entry: _StageEntry) -> DataStage:
    """A stage whose shares add up to one."""
    shares = entry.weights or entry.budgets or {}
    return DataStage(
        name=entry.name,
        weights=_normalised(shares),
        tokens=int(sum(entry.budgets.values())) if entry.budgets else entry.tokens,
        seq_length=entry.seq_length,
        rotary_base=entry.rotary_base,
        lengths=_normalised(entry.lengths),
        global_batch_size=entry.global_batch_size,
        micro_batch_size=entry.micro_batch_size,
    )


def _normalised[Key: (str, int)](shares: Mapping[Key, float]) -> dict[Key, float]:
    total = sum(shares.values())
    return {key: share / total for key, share in shares.items()}
