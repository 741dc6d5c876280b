"""GPTQ's tensors are what the format says, in both versions; gptqmodel reads them: test_gptqmodel.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.formats.awq import Awq
from checkpoints_convert.formats.gptq import Gptq
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from tests.checkpoints_convert.formats.by_hand import gptq_value
from tests.checkpoints_convert.formats.weights import encoded, fitting_model, quantized, weight

SOME = [(0, 0), (1, 7), (2, 8), (3, 100), (5, 200), (7, 9), (7, 10), (40, 127), (41, 128), (47, 255)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_by_hand(bits, symmetric):
    format_ = Gptq(bits, symmetric=symmetric)
    values = weight()
    tensors = encoded(format_, values)
    expected = format_.grid.nearest(values).values()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (256 * bits // 32, 48),
        "qzeros": (2, 48 * bits // 32),
        "scales": (2, 48),
        "g_idx": (256,),
    }
    assert tensors["g_idx"].tolist() == [0] * 128 + [1] * 128
    assert (tensors["scales"] > 0).all(), "a group of zeros has a scale"
    for out, column in SOME:
        found = gptq_value(tensors, out, column, bits=bits, stored_less=1 if symmetric else 0)
        assert found == pytest.approx(float(expected[out, column]), abs=1e-7), (out, column)
        steps = abs(found - float(values[out, column])) / float(tensors["scales"][column // 128, out])
        assert steps <= 0.51 + (0.5 if abs(values[out, column]) == 4 else 0)


@pytest.mark.parametrize("format_", [Gptq(4), Gptq(8), Gptq(4, symmetric=False), Awq()])
def test_one_group_is_the_first_of_two(format_):
    """A dimension of length 1 has no order in memory that torch would keep."""
    two, one = encoded(format_, weight()), encoded(format_, weight()[:, :128])
    for name in one:
        assert torch.equal(one[name], two[name][: one[name].shape[0]]), name


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zeros_are_stored_less_one(bits, word):
    assert set(encoded(Gptq(bits), weight())["qzeros"].flatten().tolist()) == {word}


def test_asymmetric_weights_use_all_codes():
    """Negative control of the grid: one-sided values would waste half of a symmetric one."""
    values = weight().abs()
    errors = {
        symmetric: float((Gptq(4, symmetric=symmetric).grid.nearest(values).values() - values.float()).abs().mean())
        for symmetric in (True, False)
    }
    assert errors[False] < 0.6 * errors[True]


def test_pack_of_a_calibrated_layer_with_its_own_order():
    format_ = Gptq(4, act_order=True)
    linear = format_.grid.nearest(weight())
    order = (torch.arange(256, dtype=torch.int32) * 5 % 256) // 128
    tensors = format_.pack(QuantizedLinear(linear.codes, linear.scales, linear.zeros, order))
    assert tensors["g_idx"].tolist() == order.tolist()
    expected = QuantizedLinear(linear.codes, linear.scales, linear.zeros, order).values()
    for out, column in SOME:
        assert gptq_value(tensors, out, column, bits=4, stored_less=1) == pytest.approx(float(expected[out, column]))


def test_pack_gives_the_bytes_of_the_encoding():
    for format_ in (Gptq(4), Gptq(8), Gptq(4, symmetric=False)):
        packed, tensors = format_.pack(format_.grid.nearest(weight())), encoded(format_, weight())
        assert packed.keys() == tensors.keys()
        assert all(torch.equal(packed[name], tensors[name]) for name in packed)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((64, 200), "no multiple of the group"), ((64, 192), "--group-size 64"), ((60, 256), "share a 32-bit word")],
)
def test_shapes_it_cannot_hold(shape, words):
    problem = Gptq(4).shape_problem("model.layers.0.self_attn.q_proj.weight", shape)
    assert words in str(problem)
    assert Gptq(4).shape_problem("x", (64, 256)) is None


def test_a_feed_forward_is_told_of_padding():
    assert "--pad-ffn auto" in str(Gptq(4).shape_problem("model.layers.0.mlp.down_proj.weight", (64, 200)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_directory(symmetric, tmp_path):
    hf = fitting_model("qwen2_moe fitting", tmp_path / "hf")
    quantized(hf, tmp_path / "out", Gptq(4, symmetric=symmetric))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = config["quantization_config"]
    assert stated == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert stated["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (stated["sym"], stated["desc_act"], stated["bits"], stated["group_size"]) == (symmetric, False, 4, 128)
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(next(Path(hf).glob("*.safetensors")))
    kept = {name for name in tensors if name.rpartition(".")[2] in ("weight", "bias")}
    assert {name for name in kept if "_proj.weight" in name} == set()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= kept
    assert "model.layers.0.mlp.shared_expert_gate.weight" in kept
    assert all(torch.equal(tensors[name], original[name].half()) for name in kept)
    expert = "model.layers.1.mlp.experts.3.down_proj"
    expected = Gptq(4, symmetric=symmetric).grid.nearest(original[f"{expert}.weight"]).values()
    layer = {name: tensors[f"{expert}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    for out, column in ((0, 0), (9, 77), (255, 127)):
        found = gptq_value(layer, out, column, bits=4, stored_less=1 if symmetric else 0)
        assert found == pytest.approx(float(expected[out, column]), abs=1e-7)
