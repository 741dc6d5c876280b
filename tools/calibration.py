"""The fraction of a device's peak rates that finished runs achieved, and the estimate of each run with it."""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.calibration import fit_achieved
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.step_time import step_time
from megatron_qwen.recipes.registry import RECIPES
from tools.run_records import read_metrics

# A run's first steps compile and warm up.
_WARM_UP = 5


def calibration_report(runs: Sequence[Path], device: Hardware, *, as_json: bool) -> str:
    """Fits the achieved fraction of peak to measured steps, and shows predicted and measured figures.

    Args:
        runs: run directories.
        device: what they ran on.
        as_json: JSON instead of a table.

    Raises:
        DataError: a run has too few steps.
    """
    seen = [_measured(run) for run in runs]
    achieved = fit_achieved([(speed, partial(_predicted, config, count, device)) for config, count, speed in seen])
    rows = []
    for run, (config, devices, speed) in zip(runs, seen, strict=True):
        ours = _predicted(config, devices, device, achieved)
        rows.append((str(run), devices, speed, ours, ours / speed))
    if as_json:
        names = ("run", "devices", "measured", "predicted", "ratio")
        return json.dumps(
            {"achieved": achieved, "runs": [dict(zip(names, row, strict=True)) for row in rows]}, indent=2
        )
    lines = [f"{'run':<40}{'devices':>8}{'measured':>12}{'predicted':>12}{'ratio':>8}  (tokens/s of a device)"]
    lines += [
        f"{run:<40}{count:>8}{speed:>12,.1f}{ours:>12,.1f}{ratio:>8.3f}" for run, count, speed, ours, ratio in rows
    ]
    return "\n".join([*lines, f"--achieved {achieved:.3g}"])


def _predicted(config: RunConfig, devices: int, device: Hardware, achieved: float) -> float:
    time = step_time(config, device=device, world_size=devices, assumptions=Assumptions(achieved=achieved))
    return time.tokens / time.seconds / devices


def _measured(run: Path) -> tuple[RunConfig, int, float]:
    """Configuration, devices, and the median tokens a second of a device after the first steps."""
    config = resolve(str(run / "run.yaml"), [], RECIPES)
    if config.data.blend is not None:
        raise DataError(
            Problem(str(run), None, "has a blend with different data stages; calibrate with a run of one stage.")
        )
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["iteration"] > _WARM_UP]
    if not records:
        raise DataError(Problem(str(run), None, f"has no step after its first {_WARM_UP}; let it run longer."))
    speed = statistics.median(record["tokens_per_second_per_device"] for record in records)
    whole = statistics.median(record["tokens_per_second"] for record in records)
    return config, round(whole / speed), speed
