"""AWQ's tensors are what the format says; gptqmodel reads them: test_gptqmodel.py."""

import json

import pytest
import torch

from checkpoints_convert.formats.awq import Awq, unpacked_words
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from tests.checkpoints_convert.formats.by_hand import awq_value
from tests.checkpoints_convert.formats.weights import encoded, fitting_model, quantized, weight

SOME = [(0, 0), (1, 7), (2, 8), (3, 100), (4, 31), (5, 200), (6, 1), (7, 9), (40, 127), (41, 128), (47, 255)]


def test_values_by_hand():
    values = weight()
    tensors = encoded(Awq(), values)
    expected = Awq().grid.nearest(values).values()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (256, 6),
        "qzeros": (2, 6),
        "scales": (2, 48),
    }
    assert (tensors["scales"] > 0).all(), "a group of zeros has a scale"
    for out, column in SOME:
        found = awq_value(tensors, out, column, group=128)
        assert found == pytest.approx(float(expected[out, column]), abs=1e-7), (out, column)


def test_another_order_of_places_is_another_weight():
    """Negative control: the order matters, and the check sees it."""
    tensors = encoded(Awq(), weight())
    expected = Awq().grid.nearest(weight()).values()
    wrong = sum(
        abs(awq_value(tensors, out ^ 2, column, group=128) - float(expected[out, column])) > 1e-3
        for out, column in SOME
    )
    assert wrong > len(SOME) // 2


def test_words_are_unpacked_to_what_they_were():
    linear = Awq().grid.nearest(weight())
    packed = Awq().pack(linear)
    assert torch.equal(unpacked_words(packed["qweight"]), linear.codes)
    assert torch.equal(unpacked_words(packed["qzeros"]), linear.zeros)


def test_a_layer_with_an_order_of_its_own_is_refused():
    linear = Awq().grid.nearest(weight())
    with pytest.raises(AssertionError, match="consecutive"):
        Awq().pack(QuantizedLinear(linear.codes, linear.scales, linear.zeros, torch.zeros(256, dtype=torch.int32)))


def test_a_directory_says_what_is_not_converted(tmp_path):
    quantized(fitting_model("qwen2_moe fitting", tmp_path / "hf"), tmp_path / "out", Awq())
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gates = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate", "shared_expert_gate")]
    assert sorted(stated["modules_to_not_convert"]) == sorted(["lm_head", *gates])
    assert (stated["quant_method"], stated["version"], stated["zero_point"]) == ("awq", "gemm", True)
