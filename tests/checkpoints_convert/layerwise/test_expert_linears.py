"""Experts as linears of their own compute what transformers' stacked experts compute."""

import copy

import pytest
import torch

from checkpoints_convert.layerwise.expert_linears import separate_experts
from checkpoints_convert.layerwise.layered_hf import HfLayers
from tests.checkpoints_convert.quantize.trained import made, opened


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_separate_experts_compute_the_same(name, tmp_path_factory):
    source = opened(made(name, tmp_path_factory))
    layers = HfLayers(source.weights, source.config, dtype=torch.float32, place=torch.device("cpu"))
    layers.load_layer(1)
    hidden = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    expected = layers.layer(hidden)
    stacked = copy.deepcopy(layers.loaded.mlp.experts)
    separate_experts(layers.loaded)
    assert torch.allclose(layers.layer(hidden), expected, atol=1e-5)
    experts = layers.loaded.mlp.experts
    assert len(experts) == 4
    for index, expert in enumerate(experts):
        prefix = f"model.layers.1.mlp.experts.{index}."
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = f"{prefix}{kind}.weight"
            rows = source.weights.rows(name, 0, source.weights.tensors[name].shape[0])
            assert torch.equal(expert.get_submodule(kind).weight, rows)
    # Also where all tokens choose the same experts, so that others get none.
    chosen, shares = torch.tensor([[2, 0]] * 5), torch.full((5, 2), 0.5)
    assert torch.allclose(experts(hidden[:5], chosen, shares), stacked(hidden[:5], chosen, shares), atol=1e-6)


def test_a_layer_without_experts_stays_as_it_is(tmp_path_factory):
    source = opened(made("qwen2", tmp_path_factory))
    layers = HfLayers(source.weights, source.config, dtype=torch.float32, place=torch.device("cpu"))
    layers.load_layer(0)
    before = dict(layers.loaded.named_modules())
    separate_experts(layers.loaded)
    assert dict(layers.loaded.named_modules()) == before
