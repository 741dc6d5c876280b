"""config.json, byte for byte."""

import json
import re

import pytest

from megatron_qwen.errors import ConversionError
from megatron_qwen.hf.config import architecture_from_hf, hf_config
from megatron_qwen.hf.kept import in_spelling_of, keys_with_effect
from megatron_qwen.recipes.registry import RECIPES

# Written by hand from the recipe: its base is that of the first stage of pretraining.
QWEN2_5_0_5B = """{
  "architectures": [
    "Qwen2ForCausalLM"
  ],
  "model_type": "qwen2",
  "vocab_size": 151936,
  "hidden_size": 896,
  "intermediate_size": 4864,
  "num_hidden_layers": 24,
  "num_attention_heads": 14,
  "num_key_value_heads": 2,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-06,
  "tie_word_embeddings": true,
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "rope_theta": 10000.0,
  "use_sliding_window": false,
  "use_cache": true,
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "torch_dtype": "bfloat16"
}"""


def test_bytes_of_an_export():
    content = hf_config(RECIPES["qwen2_5_0_5b"]().architecture, eos_token_id=1, bos_token_id=0, dtype="bfloat16")
    assert json.dumps(content, indent=2) == QWEN2_5_0_5B


def test_a_scaled_rope_is_not_exported_as_a_plain_one():
    config = RECIPES["tiny_dense"]().with_section("rope", scaling=4.0)
    with pytest.raises(ConversionError, match=r"rope\.scaling = 4\.0"):
        hf_config(config.architecture, eos_token_id=1, bos_token_id=0, dtype="bfloat16")


def test_a_base_out_of_bounds():
    content = json.loads(QWEN2_5_0_5B) | {"rope_theta": 1}
    with pytest.raises(ConversionError, match=r"config\.json: rope\.base = 1\.0: must be greater than 1"):
        architecture_from_hf(content, where="config.json")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"type": "default", "rope_theta": 5e5}, "rope_theta": 500_000}, 5e5),
        ({"rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 5e5}}, "rope_parameters.type = yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters.rope_type = yarn"),
        ({"rope_parameters": {"rope_type": "default", "type": "linear"}, "rope_theta": 5e5}, "type = linear"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, "differs from rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta: is missing"),
    ],
)
def test_where_the_base_of_rope_is(fields, wanted):
    content = {name: value for name, value in json.loads(QWEN2_5_0_5B).items() if name != "rope_theta"} | fields
    if isinstance(wanted, float):
        assert architecture_from_hf(content, where="config.json").rope.base == wanted
    else:
        with pytest.raises(ConversionError, match=re.escape(wanted)):
            architecture_from_hf(content, where="config.json")


def test_rope_keeps_its_spelling():
    """Training may have changed the base, which stays where it was."""
    trained = {"rope_theta": 1e6, "torch_dtype": "bfloat16"}
    content = {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e4, "dtype": "float32"}
    wanted = {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6, "dtype": "bfloat16"}
    assert in_spelling_of(trained, content) == wanted
    content = {"rope_parameters": {"rope_theta": 1e4}, "torch_dtype": "float32", "dtype": "float32"}
    told = in_spelling_of(trained, content)
    assert told == trained | {"rope_parameters": {"rope_theta": 1e6}, "dtype": "bfloat16"}


def qwen3(**fields: object) -> dict[str, object]:
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64, "attention_bias": False}
    return json.loads(QWEN2_5_0_5B) | own | fields


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": [["full_attention"]]},
        {"layer_types": [{}]},
        {"layer_types": []},
        {"layer_types": "full_attention"},
        {"qkv_bias": True},
        {"shared_expert_intermediate_size": 40},
    ],
)
def test_what_a_qwen3_model_cannot_have(fields):
    ((name, _),) = fields.items()
    with pytest.raises(ConversionError, match=rf"config\.json: {name} = .*is not supported"):
        architecture_from_hf(qwen3(**fields), where="config.json")


def test_what_a_qwen3_model_says_it_has_not():
    content = qwen3(qkv_bias=False, shared_expert_intermediate_size=0, layer_types=["full_attention"] * 24)
    model = architecture_from_hf(content, where="config.json").model
    assert (model.add_qkv_bias, model.moe_shared_expert_intermediate_size) == (False, None)
    config = hf_config(architecture_from_hf(content, where=""), eos_token_id=1, bos_token_id=0, dtype="bfloat16")
    assert in_spelling_of(config, content) == content
    assert list(in_spelling_of(config, content)) == list(content)


BOOKKEEPING = {
    "_attn_implementation_autoset": True,
    "_experts_implementation": "grouped_mm",
    "model_max_length": 32768,
    "gradient_checkpointing": False,
    "_from_model_config": True,
}


def test_bookkeeping_has_no_effect():
    assert keys_with_effect({"model_type": "qwen2", **BOOKKEEPING}) == {}


@pytest.mark.parametrize(
    ("kind", "value", "effect"),
    [
        ("qwen3", True, False),
        ("qwen3_moe", True, False),
        ("qwen3", False, True),
        ("qwen2", True, True),
        ("qwen2", False, False),
    ],
)
def test_norms_of_queries_and_keys_are_what_the_class_has(kind, value, effect):
    assert ("use_qk_norm" in keys_with_effect({"model_type": kind, "use_qk_norm": value})) == effect
