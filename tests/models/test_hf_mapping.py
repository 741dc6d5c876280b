"""The mapping table is one to one, in both directions, and names what transformers names."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_qwen.models.hf_config import hf_config
from megatron_qwen.models.hf_mapping import mapped, rules
from megatron_qwen.recipes.registry import RECIPES


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "demo"])
def test_names_are_those_of_transformers(recipe):
    model = RECIPES[recipe]().model
    names = [name for item in mapped(model) for name in item.names]
    assert len(names) == len(set(names))
    content = hf_config(model, eos_token_id=0, bos_token_id=0, dtype="float32")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    expected = set(theirs.state_dict())
    if model.is_moe:  # transformers holds a layer's experts as one tensor and reads them one by one
        assert {name for name in names if ".experts." not in name} == {
            name for name in expected if ".experts." not in name
        }
    else:
        assert set(names) == expected - ({"lm_head.weight"} if model.share_embeddings_and_output_weights else set())


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe"])
def test_split_and_join_are_inverse(recipe):
    model = RECIPES[recipe]().model
    rows = {
        "linear_qkv.weight": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        "linear_qkv.bias": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        "linear_fc1.weight": 2 * model.ffn_hidden_size,
    }
    for rule in rules(model):
        height = next((value for name, value in rows.items() if rule.core.endswith(name)), model.vocab_size)
        tensor = torch.randn(height) if rule.core.endswith("bias") else torch.randn(height, 5)
        parts = rule.split(tensor, model)
        assert len(parts) == len(rule.hf), rule.core
        assert torch.equal(rule.join(parts, model), tensor), rule.core
