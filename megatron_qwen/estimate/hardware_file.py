"""A device's ceilings as a file: ``mq bench ceilings --hardware FILE`` writes one, ``mq plan --gpu FILE`` reads it."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from megatron_qwen.config.fields import WrongType, coerce
from megatron_qwen.config.render import dump
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware import Hardware, ProductRate, hardware

_MAY_BE_ZERO = {"host_us_per_layer", "host_us_per_expert", "exposed_traffic", "launch_us"}
# Files that were measured before this was a field have none.
_OPTIONAL = {"host_us_per_expert"}
_DIRECTIONS, _LEAST = 2, 1e-12


def write_hardware(path: Path, device: Hardware) -> None:
    """Writes the file; one that is there is replaced."""
    content = dataclasses.asdict(device)
    content["attention_tflops"] = list(device.attention_tflops)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(content), encoding="utf-8")


def find_hardware(name: str) -> Hardware:
    """A kind of device by its name, or what a hardware file says.

    Raises:
        ConfigError: there is neither.
    """
    is_file = name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_file()
    return read_hardware(Path(name)) if is_file else hardware(name)


def read_hardware(path: Path) -> Hardware:
    """Reads the file.

    Raises:
        ConfigError: with every field that is missing, unknown, or no number above zero.
    """
    content = read_mapping(path)
    problems: list[Problem] = []
    rates = {name: _rate(path, name, content.pop(name, None), problems) for name in ("bf16", "fp8")}
    if rates["bf16"] is None and not problems:
        problems.append(Problem(f"{path}: bf16", None, "is missing."))
    hints = {name: kind for name, kind in get_type_hints(Hardware).items() if name not in rates}
    values = _values(path, "", hints, content, problems)
    if problems:
        raise ConfigError(problems)
    forward, backward = values.pop("attention_tflops")
    bf16 = rates["bf16"]
    assert bf16 is not None
    return Hardware(**values, attention_tflops=(forward, backward), bf16=bf16, fp8=rates["fp8"])


def _rate(path: Path, name: str, content: Any, problems: list[Problem]) -> ProductRate | None:
    if content is None:
        return None
    if not isinstance(content, dict):
        problems.append(Problem(f"{path}: {name}", content, "must hold the fields of a rate, or null."))
        return None
    before = len(problems)
    values = _values(path, f"{name}.", get_type_hints(ProductRate), content, problems)
    return ProductRate(**values) if len(problems) == before else None


def _values(
    path: Path, prefix: str, hints: dict[str, Any], content: dict[str, Any], problems: list[Problem]
) -> dict[str, Any]:
    """The fields with their types; what is wrong is added to the problems."""
    values = {}
    for name in content.keys() - hints.keys():
        fix = f"is not a field; known: {', '.join(hints)}."
        problems.append(Problem(f"{path}: {prefix}{name}", content[name], fix))
    for name, kind in hints.items():
        where = f"{path}: {prefix}{name}"
        if name not in content and name in _OPTIONAL:
            continue
        if name not in content:
            problems.append(Problem(where, None, "is missing."))
            continue
        try:
            value = coerce(content[name], kind)
        except WrongType:
            problems.append(Problem(where, content[name], "has the wrong type."))
            continue
        if complaint := _complaint(name, value):
            problems.append(Problem(where, content[name], complaint))
        values[name] = value
    return values


def _complaint(name: str, value: Any) -> str | None:
    """What is wrong with a value of the right type."""
    if isinstance(value, tuple) and len(value) != _DIRECTIONS:
        return "must be two numbers: forward and backward."
    least = 0.0 if name in _MAY_BE_ZERO else _LEAST
    numbers = value if isinstance(value, tuple) else (value,)
    if all(isinstance(number, str) or least <= number < float("inf") for number in numbers):
        return None
    return "must be a finite number above zero."
