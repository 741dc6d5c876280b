"""Predicted times, by counting the operations of a layer by hand."""

import pytest

from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.calibration_progress import LayerSeconds
from checkpoints_convert.quantize.calibration_time import LayerWork, layer_work, predicted_seconds
from megatron_qwen.recipes.registry import RECIPES

OPTIONS = CalibrationOptions()


def work(recipe, method, **named):
    return layer_work(RECIPES[recipe]().model, method, **{"count": 512, "length": 2048, "options": OPTIONS} | named)


def test_operations_of_a_layer_of_7b():
    tokens, hidden, ffn, values = 512 * 2048, 3584, 18_944, 512
    qkv, output = hidden * (hidden + 2 * values), hidden * hidden
    gate_up, down = 2 * hidden * ffn, ffn * hidden
    attention = tokens * 2048 * hidden * 2
    found = work("qwen2_5_7b", "gptq")
    # q k v run four times, o three times, gate and up twice, down once.
    gemms = 2 * tokens * (4 * qkv + 3 * output + 2 * gate_up + down)
    assert found.run == pytest.approx(gemms + 4 * attention, rel=1e-9)
    # Half of X^T X for q k v, for o, for gate and up, and for down.
    assert found.sums == pytest.approx(tokens * (3 * hidden**2 + ffn**2))
    rounding = (hidden + 2 * values) * hidden**2 + hidden * hidden**2 + 2 * ffn * hidden**2 + hidden * ffn**2
    assert found.solve == pytest.approx(rounding + 4 / 3 * (3 * hidden**3 + ffn**3))


def test_other_methods():
    gptq, awq, smooth = (work("qwen2_5_7b", method) for method in ("gptq", "awq", "smoothquant"))
    assert awq.sums == gptq.sums
    assert smooth.sums == smooth.solve == 0
    assert smooth.run < awq.run
    assert awq.solve > gptq.solve


def test_seconds_scale_part_by_part():
    measured, done = LayerSeconds(10.0, 4.0, 6.0), LayerWork(1e9, 1e9, 1e9)
    assert predicted_seconds(measured, done, target=done, layers=3) == pytest.approx(60)
    target = LayerWork(2e9, 3e9, 5e8)
    assert predicted_seconds(measured, done, target=target, layers=2) == pytest.approx(2 * (20 + 12 + 3))
    # What a method does not do (SmoothQuant has no Hessian) is taken as measured.
    nothing = LayerWork(1e9, 0.0, 0.0)
    assert predicted_seconds(measured, nothing, target=nothing, layers=1) == pytest.approx(20)


def test_twice_the_samples_take_twice_the_passes():
    one, two = work("qwen2_5_7b", "gptq"), work("qwen2_5_7b", "gptq", count=1024)
    assert (two.run, two.sums, two.solve) == (2 * one.run, 2 * one.sums, one.solve)
