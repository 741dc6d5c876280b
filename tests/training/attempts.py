"""Single attempts at tiny runs, and what they wrote."""

import json
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs


def attempt(pool: Any, ranks: int, config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Runs one attempt; returns the records."""
    RunDirectory(run_dir).claim(config)
    assert pool[ranks].run(jobs.attempt, config, run_dir) == [0] * ranks
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def configure(recipe: str, tokens: Path, *overrides: str) -> RunConfig:
    return resolve(recipe, [f"data.path={tokens}", *overrides], RECIPES)
