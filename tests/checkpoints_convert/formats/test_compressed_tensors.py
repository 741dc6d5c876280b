"""The formats of compressed-tensors: by hand, and as transformers loads them with that library."""

import compressed_tensors
import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints_convert.formats.compressed_tensors import W4A16, W8A8, Fp8
from checkpoints_convert.formats.quantized_format import is_quantized
from tests.checkpoints_convert.formats.by_hand import per_block, per_row, w4a16_value
from tests.checkpoints_convert.formats.weights import (
    encoded,
    fitting_model,
    loaded,
    logits,
    of_values,
    quantized,
    weight,
    with_weights,
)
from tests.tiers import cases

assert compressed_tensors.__version__  # transformers imports it where it loads such a model
# Largest difference of a logit to the model of the same weights in float32, at an rms of 0.8. Inputs of w8a8 and fp8
# are rounded too: measured were 0.09 of int8, 0.22 to 0.35 of FP8, which has three bits.
FORMATS = {"w4a16": (W4A16(), 1e-5), "w8a8": (W8A8(), 0.1), "fp8": (Fp8(), 0.4), "fp8 blocks": (Fp8(blocks=True), 0.4)}
MODELS = cases(["qwen2 fitting"], ["qwen3 fitting tied"])


def test_w4a16_by_hand():
    values = weight()
    tensors = encoded(W4A16(), values)
    expected = W4A16().grid.nearest(values).values()
    assert tensors["weight_shape"].tolist() == [48, 256]
    assert (tensors["weight_scale"] > 0).all(), "a group of zeros has a scale"
    for out, column in [(0, 0), (1, 7), (2, 8), (3, 100), (5, 200), (7, 9), (47, 255)]:
        assert w4a16_value(tensors, out, column, group=128) == pytest.approx(float(expected[out, column]), abs=1e-7)


def test_w8a8_by_hand():
    values = weight()
    tensors = encoded(W8A8(), values)
    assert tensors["weight"].dtype == torch.int8
    assert (tensors["weight_scale"] > 0).all(), "a row of zeros has a scale"
    found = per_row(tensors)
    assert torch.equal(found, W8A8().grid.nearest(values).values())
    steps = (found - values.float()).abs() / tensors["weight_scale"].float()
    assert steps.max() <= 1.01  # the largest value of a row may be half a step beyond the last code
    assert steps.mean() < 0.27


@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_by_hand(blocks):
    values = weight(130, 200)
    tensors = encoded(Fp8(blocks), values)
    assert tensors["weight_scale"].shape == ((2, 2) if blocks else (130, 1))
    assert (tensors["weight_scale"] > 0).all(), "a row of zeros has a scale"
    found = per_block(tensors, "weight_scale") if blocks else per_row(tensors)
    scales = tensors["weight_scale"].float()
    scales = scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200] if blocks else scales
    # e4m3 has three bits behind the first: half of 1/8 of a value; its smallest step is 2^-9.
    limit = values.float().abs() / 16 + scales * 2.0**-10 + 2.0**-8 * values.float().abs()
    assert ((found - values.float()).abs() <= limit).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_computes_with_the_written_weights(name, model, tmp_path):
    format_, limit = FORMATS[name]
    hf = fitting_model(model, tmp_path / "hf")
    quantized(hf, tmp_path / "out", format_)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(hf / "model.safetensors")
    values = {}
    for weight_name in filter(is_quantized, original):
        module = weight_name.rpartition(".")[0]
        layer = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{module}.")}
        if name == "w4a16":
            values[weight_name] = W4A16().grid.nearest(original[weight_name]).values()
        else:
            values[weight_name] = per_block(layer, "weight_scale") if "blocks" in name else per_row(layer)
    reference = logits(with_weights(hf, values))
    read = loaded(tmp_path / "out")
    found = logits(read)
    parameters = dict(read.named_parameters())
    for weight_name, expected in values.items():
        # The library multiplies in the format of the scales.
        assert torch.allclose(parameters[weight_name], expected, rtol=2.0**-8, atol=1e-6), weight_name
    difference = float((found - reference).abs().max())
    print(f"{name}, {model}: {difference:.1e} of rms {reference.std():.2f}")
    assert difference <= limit
    unrounded = float((logits(with_weights(hf, {})) - reference).abs().max())
    assert unrounded > 1e-3, "the check could not tell the quantized model from the original"


@pytest.mark.parametrize("model", cases(["qwen2_moe fitting"], ["qwen3_moe fitting"]))
@pytest.mark.parametrize("name", cases(["fp8"], ["w4a16"]))
def test_transformers_dequantizes_experts(name, model, tmp_path):
    """It keeps the experts of a layer in one tensor, which it dequantizes; 5.24 does of FP8 per row and int4."""
    format_, _ = FORMATS[name]
    hf = fitting_model(model, tmp_path / "hf")
    quantized(hf, tmp_path / "out", format_)
    tensors, values = load_file(tmp_path / "out" / "model.safetensors"), load_file(hf / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight_scale" in tensors
    for weight_name in filter(is_quantized, list(values)):
        module = weight_name.rpartition(".")[0]
        layer = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{module}.")}
        if name == "w4a16":
            values[weight_name] = W4A16().grid.nearest(values[weight_name]).values()
        else:
            values[weight_name] = per_block(layer, "weight_scale") if "blocks" in name else per_row(layer)
    reference = logits(of_values(hf, values, dtype=torch.float32))
    how = transformers.CompressedTensorsConfig(dequantize=True)
    found = logits(loaded(tmp_path / "out", quantization_config=how))
    # In the middle of all positions: it multiplies values and scales in bf16, and a router may choose another expert.
    difference = float((found - reference).abs().amax(-1).median())
    print(f"{name}, {model}: {difference:.1e} of rms {reference.std():.2f}")
    assert difference <= 0.03


def test_any_width_fits_formats_without_groups():
    for format_ in (W8A8(), Fp8(), Fp8(blocks=True)):
        assert format_.shape_problem("x", (60, 130)) is None
    assert "group" in str(W4A16().shape_problem("x", (60, 130)))
    assert W4A16().shape_problem("x", (60, 256)) is None
