"""SmoothQuant moves the range of outlying inputs into the weights."""

import pytest
import torch

from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.quantize.calibrate import calibrate
from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.smoothquant import smoothing_scales
from tests.checkpoints_convert.quantize.correlated import weight_and_inputs
from tests.checkpoints_convert.quantize.trained import made, opened, samples

GRID = Grid(8, None, True, torch.float32)
WEIGHT, INPUTS = weight_and_inputs()


def int8(values: torch.Tensor) -> torch.Tensor:
    """Rounded per row, as activations are per token."""
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values / scale).round() * scale


def test_scales_by_the_formula():
    found = smoothing_scales(torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 4.0, 2.0]), alpha=0.5)
    assert found.tolist() == pytest.approx([2.0, 1.5, 1.0])
    assert smoothing_scales(torch.tensor([4.0]), torch.tensor([0.5]), alpha=1.0).tolist() == pytest.approx([4.0])
    assert smoothing_scales(torch.tensor([4.0]), torch.tensor([0.5]), alpha=0.0).tolist() == pytest.approx([2.0])


def test_lower_error_than_without():
    """Both sides rounded to int8, as whoever serves the model rounds them."""
    expected = INPUTS @ WEIGHT.t()
    scales = smoothing_scales(INPUTS.abs().amax(0), WEIGHT.abs().amax(0), alpha=0.5)
    plain, smooth = (
        (int8(INPUTS / by) @ GRID.nearest(WEIGHT * by).values().t() - expected).square().mean()
        for by in (torch.ones(256), scales)
    )
    assert smooth < plain / 2


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_a_model(name, tmp_path_factory, tmp_path):
    """Norms and columns change together, by the statistics of the model as it was."""
    source = opened(made(name, tmp_path_factory))
    store = calibrate(
        source,
        method="smoothquant",
        grid=GRID,
        samples=samples(8),
        options=CalibrationOptions(workers=2, alpha=0.6),
        work=tmp_path,
        progress=lambda progress: None,
    )

    def whole(name):
        return source.weights.rows(name, 0, source.weights.tensors[name].shape[0])

    for index in range(2):
        prefix = f"model.layers.{index}."
        readers = [f"{prefix}self_attn.{kind}_proj.weight" for kind in "qkv"]
        after, before = store.changed(f"{prefix}input_layernorm.weight"), whole(f"{prefix}input_layernorm.weight")
        scales = before / after
        assert float(scales.max() / scales.min()) > 1.5
        for reader in readers:
            linear = store.linear(reader)
            expected = whole(reader) * scales
            assert float((linear.values() - expected).abs().max()) <= float(linear.scales.max()) * 0.51
        assert store.changed(f"{prefix}self_attn.o_proj.weight") is None
        if name == "qwen2_moe":
            ratio = whole(f"{prefix}post_attention_layernorm.weight") / store.changed(
                f"{prefix}post_attention_layernorm.weight"
            )
            for other in ("mlp.gate.weight", "mlp.shared_expert_gate.weight"):
                assert torch.allclose(store.changed(prefix + other), whole(prefix + other) * ratio, rtol=1e-4)
    assert store.changed("model.embed_tokens.weight") is None
