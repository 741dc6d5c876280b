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

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_qwen.config.fields import Bounds
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import Override, resolve
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.hardware_file import find_hardware
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES

# Bounds that catch a typing error; a study of a thousand values or twenty rounds is none that anybody runs.
_MOST_VALUES = 1000
_MOST_ROUNDS = 20
_Positive = Annotated[float, Bounds(above=0)]
_Share = Annotated[float, Bounds(above=0, below=1)]
_Count = Annotated[int, Bounds(minimum=1)]
# One number stands for a list of one.
_Numbers = tuple[_Positive, ...] | _Positive


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


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Values in equal ratios."""

    low: _Positive
    high: _Positive
    count: Annotated[int, Bounds(minimum=1, maximum=_MOST_VALUES)]

    def values(self) -> tuple[float, ...]:
        """All of them."""
        ratio = (self.high / self.low) ** (1 / max(1, self.count - 1))
        return tuple(self.low * ratio**step for step in range(self.count))


@dataclass(frozen=True, kw_only=True)
class _Values:
    values: _Numbers


@dataclass(frozen=True, kw_only=True)
class _Params:
    params: _Numbers


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Fields of the recipe's model that are given instead of its own."""

    num_layers: _Count | None = None
    hidden_size: _Count | None = None
    ffn_hidden_size: _Count | None = None
    num_attention_heads: _Count | None = None
    num_query_groups: _Count | None = None
    kv_channels: _Count | None = None
    num_moe_experts: _Count | None = None
    moe_router_topk: _Count | None = None
    moe_ffn_hidden_size: _Count | None = None
    moe_shared_expert_intermediate_size: _Count | None = None


@dataclass(frozen=True, kw_only=True)
class _Models:
    models: tuple[_Shape, ...]


@dataclass(frozen=True, kw_only=True)
class _TokensPerParam:
    tokens_per_param: _Numbers


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    tokens: _Numbers


@dataclass(frozen=True, kw_only=True)
class _Device:
    gpu: str | None = None
    tflops: _Positive | None = None
    count: _Count = 1
    memory_gib: _Positive | None = None


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The file; see ``StudyFile``."""

    name: str | None = None
    recipe: str
    overrides: tuple[Override, ...] = ()
    shapes: _Params | _Range | _Models
    horizons: _TokensPerParam | _Tokens
    learning_rate: _Values | _Range
    batch_tokens: _Values | _Range
    schedule: Literal["wsd", "cosine"] = "wsd"
    decay_share: _Share = 0.2
    warmup_share: _Share = 0.05
    seeds: tuple[Annotated[int, Bounds(minimum=0)], ...] | None = None
    device: _Device
    budget_hours: _Positive | None = None
    adaptive_rounds: Annotated[int, Bounds(minimum=0, maximum=_MOST_ROUNDS)] = 0


def read_study(path: Path) -> StudyFile:
    """Reads a study.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    return parse_study(path, read_mapping(path))


def parse_study(path: Path, content: dict[str, Any]) -> StudyFile:
    """A study from its mapping.

    Args:
        path: of the file it stood in; a run.yaml is looked for next to it.
        content: of the file.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    reader = YamlReader(str(path))
    given = reader.read_fields(_Content, content)
    recipe = _recipe(path, str(given.get("recipe")))
    base = _base(reader, recipe, given)
    for name in ("shapes", "horizons", "learning_rate", "batch_tokens"):
        _check_values(reader, name, given.get(name))
    seeds = given.get("seeds")
    if seeds is not None and (not seeds or len(set(seeds)) != len(seeds)):
        reader.wrong("seeds", list(seeds), "must be a list of different whole numbers.")
    kind = _kind(reader, content.get("device") or {}, given.get("device"), base)
    reader.raise_problems()
    study = _Content(**given)
    assert base is not None
    named = study.name or path.stem
    return StudyFile(
        name=named,
        base=base,
        recipe=recipe,
        overrides=study.overrides,
        params=_numbers(study.shapes),
        models=_models(study.shapes),
        tokens_per_param=_numbers(study.horizons) if isinstance(study.horizons, _TokensPerParam) else (),
        tokens=_numbers(study.horizons) if isinstance(study.horizons, _Tokens) else (),
        learning_rates=_numbers(study.learning_rate),
        batches=_numbers(study.batch_tokens),
        schedule=study.schedule,
        decay_share=study.decay_share,
        warmup_share=study.warmup_share,
        seeds=study.seeds or (base.training.seed,),
        device=_device(study.device, kind),
        budget_hours=study.budget_hours,
        adaptive_rounds=study.adaptive_rounds,
        content=content | {"name": named, "recipe": recipe} | _full_paths(content),
    )


def _recipe(path: Path, named: str) -> str:
    """The recipe's name, or the full path of a run.yaml, which is looked for next to the study first."""
    if named in RECIPES:
        return named
    local = path.parent / named
    return str((local if local.is_file() else Path(named)).absolute())


def _full_paths(content: dict[str, Any]) -> dict[str, Any]:
    """The device, where a file describes it, by its full path."""
    device = content["device"]
    if not Path(str(device.get("gpu"))).is_file():
        return {}
    return {"device": device | {"gpu": str(Path(str(device["gpu"])).absolute())}}


def _base(reader: YamlReader, recipe: str, given: Mapping[str, Any]) -> RunConfig | None:
    """The recipe with its overrides."""
    if "recipe" not in given:
        return None
    try:
        return resolve(recipe, given.get("overrides", ()), RECIPES)
    except ConfigError as error:
        reader.problems += error.problems
        return None


def _check_values(reader: YamlReader, name: str, found: object) -> None:
    """Notes a list without values, and a range without a way from its low to its high end."""
    if isinstance(found, _Range):
        low, high = found.low, found.high
        if high < low or (high == low) != (found.count == 1):
            fix = "must go from low to a larger high, with a count above 1."
            reader.wrong(name, f"{low:g} to {high:g}", fix)
    elif found is not None and () in vars(found).values():
        (listed,) = vars(found)
        reader.wrong(f"{name}.{listed}", "[]", "is empty.")


def _numbers(found: object) -> tuple[float, ...]:
    """What a file lists, or the values of its range; of models none."""
    if isinstance(found, _Range):
        return found.values()
    if isinstance(found, _Models):
        return ()
    (value,) = vars(found).values()
    return value if isinstance(value, tuple) else (value,)


def _models(found: object) -> tuple[dict[str, int], ...]:
    if not isinstance(found, _Models):
        return ()
    return tuple({name: value for name, value in asdict(one).items() if value is not None} for one in found.models)


def _kind(
    reader: YamlReader, body: Mapping[str, Any], device: _Device | None, base: RunConfig | None
) -> Hardware | None:
    """The device whose speed is predicted; None where a measured rate is given, or something is wrong."""
    if device is None:
        return None
    if (body.get("gpu") is None) == (body.get("tflops") is None):
        fix = "requires either gpu, or tflops (measured model TFLOP/s of one device in a step)."
        reader.wrong("device", None, fix)
        return None
    if device.gpu is None:
        return None
    try:
        kind = find_hardware(device.gpu)
    except ConfigError as error:
        reader.problems += error.problems
        return None
    if base is not None and (reason := why_not(base, kind)):
        reader.wrong("device.gpu", device.gpu, f"cannot be planned for: the recipe {reason} Or give device.tflops.")
    return kind


def _device(found: _Device, kind: Hardware | None) -> Device:
    memory = kind.memory_gib if found.memory_gib is None and kind is not None else found.memory_gib
    return Device(kind, found.count, found.tflops, memory)
