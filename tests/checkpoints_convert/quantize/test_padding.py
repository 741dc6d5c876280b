"""Feed-forwards widened with zeros: the model computes the same, and tensor parallelism can cut it."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.compare.verify import verify
from checkpoints_convert.formats.compressed_tensors import W4A16, W8A8
from checkpoints_convert.formats.gptq import Gptq
from checkpoints_convert.hf_directory import HfDirectory
from checkpoints_convert.quantize.padding import NO_PADDING, PaddedWeights, padding_of, proposal
from checkpoints_convert.quantize.plan import require_shapes
from megatron_qwen.errors import ConfigError, ConversionError
from megatron_qwen.hf.mapping import hf_tensors
from megatron_qwen.recipes.registry import RECIPES
from tests.checkpoints_convert.formats.weights import fitting_model, loaded, logits, quantized

DENSE_72B = RECIPES["qwen2_5_72b"]().model
MOE_57B = RECIPES["qwen2_57b_a14b"]().model


def test_72b_as_qwen_did():
    assert padding_of("auto", DENSE_72B).widths == {"ffn_hidden_size": 29_696}
    assert padding_of("29696", DENSE_72B).config(DENSE_72B) == {"intermediate_size": 29_696}
    said = proposal(DENSE_72B)
    assert said is not None
    assert "29,568 is no multiple of 128 x TP for TP 2, 4, 8 (29,696 is one)" in said
    assert "--pad-ffn auto" in said
    assert "attention" not in said
    assert proposal(padding_of("auto", DENSE_72B).model(DENSE_72B)) is None


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [("qwen2_5_0_5b", "4, 8"), ("qwen2_5_1_5b", "4, 8"), ("qwen2_5_7b", "8"), ("qwen2_5_32b", None)],
)
def test_where_it_is_proposed(recipe, sizes):
    said = proposal(RECIPES[recipe]().model)
    assert (said is None) == (sizes is None)
    assert sizes is None or f"for TP {sizes} (" in str(said)


def test_0_5b_is_told_that_attention_rules_it_out_all_the_same():
    assert "The width of attention, 896, cannot be padded" in str(proposal(RECIPES["qwen2_5_0_5b"]().model))


def test_experts_and_the_shared_expert():
    shared = MOE_57B.moe_shared_expert_intermediate_size
    assert (MOE_57B.moe_ffn_hidden_size, shared) == (2560, 20_480)
    padding = padding_of("auto", MOE_57B)
    assert padding.widths == {"moe_ffn_hidden_size": 3072}
    assert padding.config(MOE_57B) == {"moe_intermediate_size": 3072}
    assert padding_of("3072,21504", MOE_57B).config(MOE_57B) == {
        "moe_intermediate_size": 3072,
        "shared_expert_intermediate_size": 21_504,
    }
    assert padding_of(None, MOE_57B) is NO_PADDING


@pytest.mark.parametrize(
    ("text", "said"),
    [("29000", "less than model.ffn_hidden_size = 29,568"), ("300000", "a mistake"), ("wide", "auto or a width")],
)
def test_refused_widths(text, said):
    with pytest.raises(ConfigError, match=said):
        padding_of(text, DENSE_72B)
    with pytest.raises(ConfigError, match="auto or a width"):
        padding_of("29696,1", DENSE_72B)


def test_rows_of_padded_weights(tmp_path):
    source = HfDirectory(fitting_model("qwen2 fitting", tmp_path / "hf"))
    model = replace(source.shape, ffn_hidden_size=512)
    padded = PaddedWeights(source, model)
    assert {name: info.shape for name, info in padded.tensors.items()} == {
        item.name: item.shape for item in hf_tensors(model)
    }
    gate, down = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "down"))
    for start, stop in ((0, 384), (0, 512), (380, 390), (384, 512), (400, 401)):
        found, there = padded.rows(gate, start, stop), min(stop, 384)
        kept = max(0, there - start)
        assert found.shape == (stop - start, 256)
        assert not found[kept:].any()
        assert not kept or torch.equal(found[:kept], source.rows(gate, start, there))
    found = padded.rows(down, 3, 9)
    assert torch.equal(found[:, :384], source.rows(down, 3, 9))
    assert not found[:, 384:].any()


@pytest.mark.parametrize("name", ["qwen2 fitting", "qwen2_moe fitting"])
def test_a_padded_model_computes_the_same(name, tmp_path):
    hf = fitting_model(name, tmp_path / "hf")
    model = HfDirectory(hf).shape
    padding = padding_of("auto" if name == "qwen2 fitting" else "256,384", model)
    for out, more in (("plain", {}), ("padded", {"padding": padding})):
        quantized(hf, tmp_path / out, W8A8() if model.is_moe else W4A16(), **more)
    content = json.loads((tmp_path / "padded" / "config.json").read_text())
    card = (tmp_path / "padded" / "README.md").read_text()
    assert "with zeros: the model computes the same" in card
    found = verify(open_side(hf), open_side(tmp_path / "padded", quantized=True), quiet=True)
    assert found.same, str(found)
    assert "with zeros" not in str(verify(open_side(hf), open_side(tmp_path / "plain", quantized=True), quiet=True))
    assert "are compared with zeros" in str(found)
    if model.is_moe:
        assert (content["moe_intermediate_size"], content["shared_expert_intermediate_size"]) == (256, 384)
        return  # compressed-tensors has no class for transformers' experts
    assert content["intermediate_size"] == 1024
    plain, padded = (logits(loaded(tmp_path / out)) for out in ("plain", "padded"))
    assert torch.allclose(plain, padded, atol=1e-5)
    assert plain.std() > 0.1


@pytest.mark.parametrize(("module", "at"), [("up_proj", (400, 3)), ("down_proj", (3, 400))])
def test_verify_finds_what_is_not_zero_in_the_padding(module, at, tmp_path):
    hf, wider = fitting_model("qwen2 fitting", tmp_path / "hf"), tmp_path / "wider"
    shape = replace(HfDirectory(hf).shape, ffn_hidden_size=512)
    padded = PaddedWeights(HfDirectory(hf), shape)
    weights = {name: padded.rows(name, 0, info.shape[0]).contiguous() for name, info in padded.tensors.items()}
    weights[f"model.layers.1.mlp.{module}.weight"][at] = 0.1
    wider.mkdir()
    save_file(weights, wider / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((hf / "config.json").read_text()) | {"intermediate_size": 512}
    (wider / "config.json").write_text(json.dumps(content))
    quantized(wider, tmp_path / "out", W8A8())
    found = verify(open_side(hf), open_side(tmp_path / "out", quantized=True), quiet=True)
    assert [item.name for item in found.differences] == [f"model.layers.1.mlp.{module}.weight"]


def test_what_a_group_does_not_fit_and_padding_repairs(tmp_path):
    config = transformers.AutoConfig.from_pretrained(fitting_model("qwen2 fitting", tmp_path / "hf"))
    assert config.intermediate_size == 384
    model = replace(HfDirectory(tmp_path / "hf").shape, ffn_hidden_size=400)
    with pytest.raises(ConversionError) as caught:
        require_shapes(model, Gptq(4))
    (problem,) = caught.value.problems  # one, not one a layer
    assert "down_proj" in problem.where
    assert "--pad-ffn auto" in problem.fix
    require_shapes(padding_of("auto", model).model(model), Gptq(4))
    require_shapes(model, W8A8())
