"""What a run wrote of itself, read leniently: a run that was killed may have left half a line."""

import math
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.json_lines import objects

# Always numbers, but null where a step was not finite.
_NUMBERS = ("lm_loss", "grad_norm", "tokens_per_second", "learning_rate", "consumed_tokens", "step_time_s")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file; lines that are no object are left out."""
    return list(objects(path.read_bytes().splitlines() if path.is_file() else ()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a loss or gradient norm that was not finite is nan.

    Raises:
        ConfigError: there are none.
    """
    if not path.is_file():
        raise ConfigError(
            Problem(str(path), None, "does not exist: this is not a run directory, or no step has finished yet.")
        )
    records = [record for record in read_lines(path) if isinstance(record.get("iteration"), int)]
    if not records:
        raise ConfigError(Problem(str(path), None, "has no step: none has finished yet."))
    return [{**record, **{name: _number(record.get(name)) for name in _NUMBERS}} for record in records]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
