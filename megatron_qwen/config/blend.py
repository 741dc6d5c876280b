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

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_qwen.config.fields import WrongType, coerce, type_name
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.errors import ConfigError, Problem

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
        fim_rate: share of documents rearranged for fill-in-the-middle (arXiv 2207.14255).
        fim_spm_rate: of those, the share in the order suffix, prefix, middle; the others are prefix, suffix, middle.
        max_epochs: a plan that reads it more often is warned about.
    """

    path: str
    packing: Literal["windows", "best_fit"] = "windows"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    max_epochs: float = _MAX_EPOCHS


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run with one mix and one length.

    Args:
        name: a run finds its place by it.
        weights: share of each source, adding up to one.
        tokens: how long it lasts; None, in the last stage, to the end of the run.
        seq_length: tokens of a sample; None is data.seq_length.
        rotary_base: RoPE base; None is model.rotary_base.
        lengths: share of the samples that is cut into independent sequences of each length; empty cuts none.
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
            config = config.with_section("model", rotary_base=self.rotary_base)
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
    stages: tuple[Stage, ...]

    def as_dict(self) -> dict[str, Any]:
        """As a blend file says it, paths in full."""
        return {
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "stages": [
                {name: value for name, value in asdict(stage).items() if value not in (None, {})}
                for stage in self.stages
            ],
        }


def stretches(config: RunConfig) -> list[RunConfig]:
    """What holds in each stage that a run reaches, with the stage's steps as training.train_iters.

    Args:
        config: of the run. A ramp of the batch is left out.

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


def single_source(path: str) -> Blend:
    """The blend of a run that names one token file."""
    return Blend({SINGLE: SourceSpec(path=path)}, (Stage(name=SINGLE, weights={SINGLE: 1.0}),))


def read_blend(path: Path) -> Blend:
    """Reads a blend file; the paths in it start where the file lies.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    content = read_mapping(path)
    problems: list[Problem] = []
    reader = _Reader(str(path), problems)
    reader.only_known("", content, ("sources", "stages"))
    sources = dict(_sources(reader, content.get("sources"), path.parent))
    stages = list(_stages(reader, content.get("stages"), sources))
    names = [stage.name for stage in stages]
    problems += [
        Problem(f"{path}: stages", name, "two stages have this name; a run finds its place by it.")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    problems += [
        Problem(f"{path}: stages.{stage.name}.tokens", None, "must be given in every stage but the last.")
        for stage in stages[:-1]
        if stage.tokens is None
    ]
    if problems:
        raise ConfigError(problems)
    return Blend(sources, tuple(stages))


class _Reader:
    """Takes typed values out of mappings and notes what is wrong."""

    def __init__(self, origin: str, problems: list[Problem]) -> None:
        self.origin, self.problems = origin, problems

    def wrong(self, where: str, value: object, fix: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(f"{self.origin}: {where}", value, fix))

    def only_known(self, where: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
        """Notes keys that mean nothing."""
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(known)}."
                self.wrong(f"{where}{key}", None, f"no such key.{hint}")

    def take(self, where: str, content: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
        """A value of a type, or the default where it is missing or wrong."""
        if key not in content:
            return default
        try:
            return coerce(content[key], kind)
        except WrongType:
            self.wrong(f"{where}{key}", content[key], f"must be {type_name(kind)}.")
            return default

    def within(self, where: str, value: float | None, least: float, most: float = float("inf")) -> None:
        """Notes a number out of bounds."""
        if value is not None and not least <= value <= most:
            bound = f"from {least:g} to {most:g}" if most < float("inf") else f"at least {least:g}"
            self.wrong(where, value, f"must be {bound}.")

    def shares(self, where: str, content: Any) -> dict[Any, float]:
        """Numbers above zero by key."""
        if not isinstance(content, dict) or not content:
            self.wrong(where, content, "must be a mapping to numbers above 0.")
            return {}
        found = {}
        for key, value in content.items():
            number = amount(value)
            if number is None or not 0 < number < float("inf"):
                self.wrong(f"{where}.{key}", value, "must be a number above 0.")
            else:
                found[key] = number
        return found


def amount(value: object) -> float | None:
    """A number, or text such as ``300B`` (K, M, B, T in thousands); None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < float("inf") else None
    if isinstance(value, str) and (match := _AMOUNT.fullmatch(value.strip())):
        return float(match[1]) * _UNITS[match[2].upper()]
    return None


def _sources(reader: _Reader, content: Any, folder: Path) -> Iterator[tuple[str, SourceSpec]]:
    if not isinstance(content, dict) or not content:
        reader.wrong("sources", content, "must name at least one source: a mapping of names.")
        return
    for name, body in content.items():
        where = f"sources.{name}."
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            reader.wrong("sources", name, "must be letters, digits, '.', '_' and '-', at most 100.")
        elif not isinstance(body, dict):
            reader.wrong(f"sources.{name}", body, "must be a mapping with at least a path.")
        else:
            reader.only_known(where, body, ("path", "packing", "fim_rate", "fim_spm_rate", "max_epochs"))
            path = reader.take(where, body, "path", str)
            if path is None:
                reader.wrong(f"{where}path", None, "must be given: the prefix of a token file.")
            spec = SourceSpec(
                path=str(folder.absolute() / path) if path and "://" not in path else str(path),
                packing=reader.take(where, body, "packing", Literal["windows", "best_fit"], "windows"),
                fim_rate=reader.take(where, body, "fim_rate", float, 0.0),
                fim_spm_rate=reader.take(where, body, "fim_spm_rate", float, 0.5),
                max_epochs=reader.take(where, body, "max_epochs", float, _MAX_EPOCHS),
            )
            reader.within(f"{where}fim_rate", spec.fim_rate, 0, 1)
            reader.within(f"{where}fim_spm_rate", spec.fim_spm_rate, 0, 1)
            reader.within(f"{where}max_epochs", spec.max_epochs, 0)
            yield name, spec


_STAGE_KEYS = (
    "name",
    "weights",
    "budgets",
    "tokens",
    "seq_length",
    "rotary_base",
    "lengths",
    "global_batch_size",
    "micro_batch_size",
)


def _stages(reader: _Reader, content: Any, sources: Mapping[str, SourceSpec]) -> Iterator[Stage]:
    if not isinstance(content, list) or not content:
        reader.wrong("stages", content, "must be a list of at least one stage.")
        return
    for index, body in enumerate(content):
        if not isinstance(body, dict):
            reader.wrong(f"stages.{index}", body, "must be a mapping.")
            continue
        name = reader.take(f"stages.{index}.", body, "name", str)
        if name is None or not _NAME.fullmatch(name):
            reader.wrong(f"stages.{index}.name", name, "must be given: letters, digits, '.', '_' and '-'.")
            name = str(index)
        where = f"stages.{name}."
        reader.only_known(where, body, _STAGE_KEYS)
        weights, tokens = _mix(reader, where, body, sources)
        stage = Stage(
            name=name,
            weights=weights,
            tokens=tokens,
            seq_length=reader.take(where, body, "seq_length", int),
            rotary_base=reader.take(where, body, "rotary_base", float),
            lengths=_lengths(reader, where, body),
            global_batch_size=reader.take(where, body, "global_batch_size", int),
            micro_batch_size=reader.take(where, body, "micro_batch_size", int),
        )
        reader.within(f"{where}seq_length", stage.seq_length, 2)
        reader.within(f"{where}rotary_base", stage.rotary_base, 1)
        reader.within(f"{where}global_batch_size", stage.global_batch_size, 1)
        reader.within(f"{where}micro_batch_size", stage.micro_batch_size, 1)
        yield stage


def _mix(
    reader: _Reader, where: str, body: Mapping[str, Any], sources: Mapping[str, SourceSpec]
) -> tuple[dict[str, float], int | None]:
    """Weights that add up to one, and the tokens of the stage."""
    given = [key for key in ("weights", "budgets") if key in body]
    if len(given) != 1:
        reader.wrong(where.rstrip("."), None, "must have either weights (shares) or budgets (tokens) of its sources.")
        return {}, None
    shares = reader.shares(f"{where}{given[0]}", body[given[0]])
    for name in shares:
        if name not in sources:
            near = difflib.get_close_matches(str(name), list(sources), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            reader.wrong(f"{where}{given[0]}.{name}", None, f"no such source.{hint}")
    total = sum(shares.values())
    tokens = amount(body["tokens"]) if "tokens" in body else None
    if "tokens" in body and (tokens is None or tokens < 1):
        reader.wrong(f"{where}tokens", body["tokens"], "must be a number of tokens, such as 300B.")
    if given == ["budgets"]:
        if tokens is not None and tokens != total:
            reader.wrong(f"{where}tokens", body["tokens"], f"contradicts the budgets, which add up to {total:,.0f}.")
        tokens = total
    weights = {str(name): share / total for name, share in shares.items()}
    return weights, None if tokens is None else int(tokens)


def _lengths(reader: _Reader, where: str, body: Mapping[str, Any]) -> dict[int, float]:
    if "lengths" not in body:
        return {}
    shares = reader.shares(f"{where}lengths", body["lengths"])
    longest = body.get("seq_length")
    found: dict[int, float] = {}
    for length, share in shares.items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            reader.wrong(f"{where}lengths", length, "must be a length in tokens.")
        elif isinstance(longest, int) and (length > longest or longest % length):
            reader.wrong(f"{where}lengths", length, f"must divide the stage's seq_length, {longest}.")
        else:
            found[length] = share
    if not isinstance(longest, int):
        reader.wrong(f"{where}lengths", None, "needs the stage's seq_length.")
    total = sum(found.values())
    return {length: share / total for length, share in found.items()}
