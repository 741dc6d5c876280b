"""config.json, byte for byte."""

import json

import pytest

from megatron_qwen.errors import ConversionError
from megatron_qwen.hf.config import architecture_from_hf, hf_config
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
