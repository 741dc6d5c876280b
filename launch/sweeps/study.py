"""A study file: which models are trained, how long, and with which settings.

```yaml
recipe: demo                      # what the study does not vary; overrides as on every command line
overrides: [data.path=corpus/all, data.tokenizer=tokenizer]
shapes: {low: 1e5, high: 5e6, count: 6}        # or params: [...], or models: [{num_layers: 4, ...}]
horizons: {tokens_per_param: [20, 40, 80]}     # or tokens: [...]
learning_rate: {low: 5e-4, high: 1.6e-2, count: 6}
batch_tokens: {values: [8192]}
schedule: wsd
adaptive_rounds: 2                             # widen grids whose optimum lies at an edge or is flat
device: {gpu: h100, count: 8}                  # or {tflops: 0.15, count: 1, memory_gib: 20}: what was measured
budget_hours: 200                              # device-hours
```
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import did_you_mean, resolve
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.hardware_file import find_hardware
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES

SCHEDULES = ("wsd", "cosine")
_MOST_VALUES = 1000
_MOST_ROUNDS = 20
_SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What a cell computes on.

    Args:
        kind: a device whose speed is predicted; None where ``tflops`` says what it reaches.
        count: of a cell.
        tflops: model FLOP/s of one device in a step, as measured.
        memory_gib: of one; None is ``kind``'s, or not checked.
    """

    kind: Hardware | None
    count: int
    tflops: float | None
    memory_gib: float | None


@dataclass(frozen=True)
class StudyFile:
    """What is to be found out.

    Args:
        name: of the study; its cells carry it.
        base: recipe with overrides.
        recipe: its name, or the full path of a run.yaml.
        overrides: as the file has them.
        params: wanted parameters a token meets, without embeddings; empty with ``models``.
        models: fields of the shape of each model; empty with ``params``.
        tokens_per_param: horizons as multiples of those parameters; empty with ``tokens``.
        tokens: horizons.
        learning_rates: peaks.
        batches: tokens of a step.
        schedule: wsd, whose horizons branch off one stem, or cosine, a run each.
        decay_share: part of a wsd run that decays.
        warmup_share: part of the shortest horizon that warms up.
        seeds: of the initial weights and the data's order.
        device: of a cell.
        budget_hours: device-hours of the whole; None is no limit.
        adaptive_rounds: how often grids are widened where their optimum lies at an edge or is flat.
        content: what it was read from, its name and recipe made independent of its place.
    """

    name: str
    base: RunConfig
    recipe: str
    overrides: tuple[str, ...]
    params: tuple[float, ...]
    models: tuple[dict[str, int], ...]
    tokens_per_param: tuple[float, ...]
    tokens: tuple[float, ...]
    learning_rates: tuple[float, ...]
    batches: tuple[float, ...]
    schedule: str
    decay_share: float
    warmup_share: float
    seeds: tuple[int, ...]
    device: Device
    budget_hours: float | None
    adaptive_rounds: int
    content: dict[str, Any]


_FIELDS = (
    "name", "recipe", "overrides", "shapes", "horizons", "learning_rate", "batch_tokens", "schedule", "decay_share",
    "warmup_share", "seeds", "device", "budget_hours", "adaptive_rounds",
)  # fmt: skip


def read_study(path: Path) -> StudyFile:
    """Reads a study.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    return parse_study(path, read_mapping(path))


def parse_study(path: Path, content: dict[str, Any]) -> StudyFile:
    """A study from its mapping.

    Args:
        path: of the file it stood in; a run.yaml is looked for beside it.
        content: of the file.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    reader = _Reader(str(path), content)
    reader.unknown("", content, _FIELDS)
    base = reader.base(path)
    params, models = reader.shapes()
    per_param, tokens = reader.one_of("horizons", ("tokens_per_param", "tokens"))
    study = {
        "name": str(content.get("name") or path.stem),
        "recipe": reader.recipe(path),
        "overrides": tuple(map(str, content.get("overrides") or ())),
        "params": params,
        "models": models,
        "tokens_per_param": per_param,
        "tokens": tokens,
        "learning_rates": reader.values("learning_rate"),
        "batches": reader.values("batch_tokens"),
        "schedule": reader.choice("schedule", SCHEDULES),
        "decay_share": reader.number("decay_share", 0.2, below=1.0),
        "warmup_share": reader.number("warmup_share", 0.05, below=1.0),
        "seeds": reader.seeds(base),
        "device": reader.device(base),
        "budget_hours": reader.number("budget_hours", None),
        "adaptive_rounds": reader.rounds(),
        "content": content | {"name": str(content.get("name") or path.stem)} | reader.independent(path),
    }
    if reader.problems:
        raise ConfigError(reader.problems)
    assert base is not None
    return StudyFile(base=base, **study)  # type: ignore[arg-type]


class _Reader:
    """Takes a study file apart and keeps what is wrong.

    Args:
        where: the file.
        content: its mapping.
    """

    def __init__(self, where: str, content: dict[str, Any]) -> None:
        self.where, self.content = where, content
        self.problems: list[Problem] = []

    def wrong(self, name: str, value: object, fix: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(f"{self.where}: {name}", value, fix))

    def unknown(self, section: str, found: dict[str, Any], known: tuple[str, ...]) -> None:
        """Notes fields that do not exist."""
        for name in found:
            if name not in known:
                hint = did_you_mean(str(name), known) or f" {', '.join(known)} are."
                self.wrong(f"{section}.{name}" if section else str(name), None, f"no such field.{hint}")

    def recipe(self, path: Path) -> str:
        """The recipe's name, or the full path of a run.yaml, which is looked for beside the study first."""
        named = str(self.content.get("recipe"))
        if named in RECIPES:
            return named
        beside = path.parent / named
        return str((beside if beside.is_file() else Path(named)).absolute())

    def independent(self, path: Path) -> dict[str, Any]:
        """What names files, by their full paths."""
        device = self.content.get("device")
        found: dict[str, Any] = {"recipe": self.recipe(path)}
        if isinstance(device, dict) and Path(str(device.get("gpu"))).is_file():
            found["device"] = device | {"gpu": str(Path(str(device["gpu"])).absolute())}
        return found

    def base(self, path: Path) -> RunConfig | None:
        """The recipe with its overrides."""
        recipe, overrides = self.content.get("recipe"), self.content.get("overrides") or []
        if not isinstance(recipe, str):
            self.wrong("recipe", recipe, "must name a recipe or a run.yaml.")
            return None
        if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
            self.wrong("overrides", overrides, "must be a list of section.field=value.")
            return None
        try:
            return resolve(self.recipe(path), overrides, RECIPES)
        except ConfigError as error:
            self.problems += error.problems
            return None

    def section(self, name: str, known: tuple[str, ...]) -> dict[str, Any]:
        """A mapping with known fields."""
        found = self.content.get(name)
        if not isinstance(found, dict):
            self.wrong(name, found, f"must be a mapping with {', '.join(known)}.")
            return {}
        self.unknown(name, found, known)
        return found

    def shapes(self) -> tuple[tuple[float, ...], tuple[dict[str, int], ...]]:
        """Wanted parameters, or models."""
        found = self.section("shapes", ("params", "low", "high", "count", "models"))
        if "models" not in found:
            return (self._range("shapes", found, "params") if found else ()), ()
        models = found["models"]
        if len(found) > 1 or not isinstance(models, list) or not models:
            self.wrong("shapes.models", models, "must be a list of shapes, and goes alone.")
            return (), ()
        kept = []
        for number, model in enumerate(models):
            name = f"shapes.models[{number}]"
            if not isinstance(model, dict):
                self.wrong(name, model, "must be a mapping of model fields.")
                continue
            self.unknown(name, model, _SHAPE_FIELDS)
            for field, value in model.items():
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    self.wrong(f"{name}.{field}", value, "must be a whole number of at least 1.")
            kept.append(model)
        return (), tuple(kept)

    def one_of(self, name: str, fields: tuple[str, str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Two ways to say the same, of which one is used."""
        found = self.section(name, fields)
        if found and len(found) != 1:
            self.wrong(name, None, f"takes one of {' and '.join(fields)}.")
        first, second = (tuple(self._numbers(f"{name}.{field}", found.get(field))) for field in fields)
        return first, second

    def values(self, name: str) -> tuple[float, ...]:
        """Values, or a range in equal ratios."""
        found = self.section(name, ("values", "low", "high", "count"))
        return self._range(name, found, "values") if found else ()

    def _range(self, name: str, found: dict[str, Any], listed: str) -> tuple[float, ...]:
        if listed in found:
            if len(found) > 1:
                self.wrong(name, None, f"takes {listed}, or low, high and count.")
            return tuple(self._numbers(f"{name}.{listed}", found[listed]))
        low, high = (
            next(iter(self._numbers(f"{name}.{end}", found.get(end), one=True)), None) for end in ("low", "high")
        )
        count = found.get("count")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST_VALUES:
            self.wrong(f"{name}.count", count, f"must be a whole number from 1 to {_MOST_VALUES}.")
            return ()
        if low is None or high is None:
            return ()
        if high < low or (high == low) != (count == 1):
            self.wrong(name, f"{low:g} to {high:g}", "must go from low to a larger high, with a count above 1.")
            return ()
        ratio = (high / low) ** (1 / max(1, count - 1))
        return tuple(low * ratio**step for step in range(count))

    def _numbers(self, name: str, value: Any, *, one: bool = False) -> Iterator[float]:
        if value is None and not one:
            return
        items = [value] if one or not isinstance(value, list) else value
        if not items:
            self.wrong(name, value, "is empty.")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | float) or not (0 < item < math.inf):
                self.wrong(name, item, "must be a number above 0.")
            else:
                yield float(item)

    def number(self, name: str, default: float | None, *, below: float = math.inf) -> float | None:
        """A number above 0."""
        value = self.content.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
            limit = "" if below == math.inf else f" and below {below:g}"
            self.wrong(name, value, f"must be a number above 0{limit}.")
            return default
        return float(value)

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """One of some words, the first by default."""
        value = self.content.get(name, known[0])
        if value not in known:
            self.wrong(name, value, f"must be one of {', '.join(known)}.")
        return str(value)

    def rounds(self) -> int:
        """A small whole number, 0 by default."""
        value = self.content.get("adaptive_rounds", 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_ROUNDS:
            self.wrong("adaptive_rounds", value, f"must be a whole number from 0 to {_MOST_ROUNDS}.")
            return 0
        return value

    def seeds(self, base: RunConfig | None) -> tuple[int, ...]:
        """Whole numbers; the recipe's where none is given."""
        value = self.content.get("seeds")
        if value is None:
            return (base.training.seed if base is not None else 0,)
        right = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        if not right or not value or len(set(value)) != len(value) or min(value) < 0:
            self.wrong("seeds", value, "must be a list of different whole numbers.")
            return ()
        return tuple(value)

    def device(self, base: RunConfig | None) -> Device:
        """A kind of GPU, or a measured rate."""
        found = self.section("device", ("gpu", "tflops", "count", "memory_gib"))
        count = found.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            self.wrong("device.count", count, "must be a whole number of at least 1.")
            count = 1
        rates = tuple(self._numbers("device.tflops", found["tflops"], one=True)) if "tflops" in found else ()
        memory = (
            tuple(self._numbers("device.memory_gib", found["memory_gib"], one=True)) if "memory_gib" in found else ()
        )
        kind = None
        if found and ("gpu" in found) == ("tflops" in found):
            self.wrong("device", None, "takes gpu, or tflops: model FLOP/s x 1e-12 that one device reaches in a step.")
        elif "gpu" in found:
            kind = self._kind(str(found["gpu"]), base)
        return Device(
            kind, count, rates[0] if rates else None, memory[0] if memory else kind.memory_gib if kind else None
        )

    def _kind(self, name: str, base: RunConfig | None) -> Hardware | None:
        try:
            kind = find_hardware(name)
        except ConfigError as error:
            self.problems += error.problems
            return None
        if base is not None and (reason := why_not(base, kind)):
            self.wrong("device.gpu", name, f"cannot be planned for: the recipe {reason} Or give device.tflops.")
        return kind
