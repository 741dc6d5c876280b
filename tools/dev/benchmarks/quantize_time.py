"""``mq bench quantize_time``: hours of GPTQ for a 7B on this machine, predicted from a measured layer of its widths."""

import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.convert import write_directory
from tools.dev.benchmarks.quantize import bf16_noise
from tools.dev.benchmarks.rows import BenchmarkRow

_RECIPE = "qwen2_5_7b"
_VOCABULARY = 1024  # layers alone are calibrated
_COUNT, _LENGTH = 4, 2048  # of the measured layer; a release takes 512
_RELEASE_COUNT = 512


def run(*, rounds: int) -> list[BenchmarkRow]:
    """One row without a requirement: what the hours are depends on the machine alone.

    Args:
        rounds: layers that are measured, each some minutes.
    """
    import torch

    from checkpoints_convert.formats.quantized_linear import Grid
    from checkpoints_convert.model_source import open_model_source
    from checkpoints_convert.quantize.calibrate import calibrate
    from checkpoints_convert.quantize.calibration_data import Samples
    from checkpoints_convert.quantize.calibration_options import CalibrationOptions
    from checkpoints_convert.quantize.calibration_progress import CalibrationProgress, LayerSeconds
    from checkpoints_convert.quantize.calibration_source import calibration_source
    from checkpoints_convert.quantize.calibration_time import layer_work, predicted_seconds

    whole = RECIPES[_RECIPE]().model
    model, options = replace(whole, num_layers=1, vocab_size=_VOCABULARY), CalibrationOptions()
    work = layer_work(model, "gptq", count=_COUNT, length=_LENGTH, options=options)
    target = layer_work(whole, "gptq", count=_RELEASE_COUNT, length=_LENGTH, options=options)
    measured: list[LayerSeconds] = []

    def take(progress: CalibrationProgress) -> None:
        if progress.layer is not None:
            measured.append(progress.layer)

    with tempfile.TemporaryDirectory(prefix="mq-bench-") as folder:
        write_directory(model, Path(folder) / "hf", noise=bf16_noise())
        directory = open_model_source(Path(folder) / "hf").directory
        assert directory is not None
        ids = torch.randint(_VOCABULARY, (_COUNT, _LENGTH), generator=torch.Generator().manual_seed(0))
        for turn in range(rounds):
            calibrate(
                calibration_source(directory),
                method="gptq",
                grid=Grid(4, 128, True, torch.float16),
                samples=Samples(ids, "random ids"),
                options=options,
                work=Path(folder) / str(turn),
                progress=take,
            )
    hours = [predicted_seconds(one, work, target=target, layers=whole.num_layers) / 3600 for one in measured]
    last = measured[-1]
    parts = f"{last.run:.0f} s of passes, {last.sums:.0f} s of Hessians, {last.solve:.0f} s to solve"
    release = f"{whole.num_layers} layers, {_RELEASE_COUNT} x {_LENGTH} tokens, fp32, {os.cpu_count()} cores"
    conditions = f"{release}; a layer with {_COUNT} x {_LENGTH}: {parts}"
    middle = statistics.median(hours)
    ratios = [middle / one for one in hours]
    name = f"gptq of {_RECIPE}, predicted"
    return [BenchmarkRow(name, middle, middle, "hours", "itself", 1.0, min(ratios), max(ratios), 0.0, conditions)]
