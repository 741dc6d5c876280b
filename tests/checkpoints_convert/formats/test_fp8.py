"""The FP8 format of DeepSeek-V3 and Qwen3: by hand, and as transformers loads it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.formats.fp8 import Fp8Block
from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid
from megatron_qwen.errors import ConversionError
from tests.checkpoints_convert.formats.by_hand import per_block
from tests.checkpoints_convert.formats.weights import (
    encoded,
    fitting_model,
    loaded,
    logits,
    of_values,
    quantized,
    weight,
)
from tests.tiers import cases


def test_values_by_hand():
    values = weight(130, 200)
    tensors = encoded(Fp8Block(), values)
    assert (tensors["weight"].dtype, tensors["weight_scale_inv"].dtype) == (torch.float8_e4m3fn, torch.float32)
    assert tensors["weight_scale_inv"].shape == (2, 2)
    found = per_block(tensors, "weight_scale_inv")
    for row, column in ((0, 0), (7, 9), (129, 199)):
        block = values[row // 128 * 128 :, column // 128 * 128 :][:128, :128].float()
        scale = float(block.abs().max()) / 448
        nearest = (values[row, column].float() / scale).to(torch.float8_e4m3fn).float() * scale
        assert float(found[row, column]) == pytest.approx(float(nearest))


def test_a_block_of_zeros_has_a_scale():
    tensors = encoded(Fp8Block(), torch.zeros(256, 128, dtype=torch.bfloat16))
    assert (tensors["weight_scale_inv"] > 0).all()
    assert (per_block(tensors, "weight_scale_inv") == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_no_scale_fits(value):
    values = weight()
    values[9, 9] = value
    with pytest.raises(ConversionError, match="not finite"):
        encoded(Fp8Block(), values)


def test_a_layer_of_codes_is_no_fp8():
    with pytest.raises(NotImplementedError):
        Fp8Block().pack(Grid(8, None, True, torch.bfloat16).nearest(weight()))


@pytest.mark.parametrize(
    "model", cases(["qwen2 fitting"], ["qwen3 fitting tied", "qwen2_moe fitting", "qwen3_moe fitting"])
)
def test_transformers_computes_with_the_written_weights(model, tmp_path):
    """Without a GPU transformers multiplies values and scales, and rounds to bf16."""
    hf = fitting_model(model, tmp_path / "hf")
    quantized(hf, tmp_path / "out", Fp8Block())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stated["quant_method"], stated["weight_block_size"]) == ("fp8", [128, 128])
    values = load_file(hf / "model.safetensors")
    unrounded = logits(loaded(hf, dtype=torch.bfloat16))
    for name in filter(is_quantized, list(values)):
        layer = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
        values[name] = per_block(layer, "weight_scale_inv").bfloat16()
    reference = logits(of_values(hf, values, dtype=torch.bfloat16))
    found = logits(loaded(tmp_path / "out", dtype=torch.bfloat16))
    difference = float((found - reference).abs().max())
    rounding = float((unrounded - reference).abs().max())
    print(f"{model}: {difference:.1e} of rms {reference.std():.2f}; of rounding {rounding:.1e}")
    assert difference <= 1e-5
    assert rounding > 1e-3
