"""Recipes of released models against the figures of their config.json, written down by hand."""

import pytest

from megatron_qwen.recipes.registry import RECIPES

# Layers, hidden, query heads, KV heads, channels of a head, FFN, tied embeddings, rows, positions, norm epsilon.
DENSE = {
    "qwen2_5_0_5b": (24, 896, 14, 2, 64, 4864, True, 151936, 32768, 1e-6),
    "qwen2_5_1_5b": (28, 1536, 12, 2, 128, 8960, True, 151936, 131072, 1e-6),
    "qwen2_5_3b": (36, 2048, 16, 2, 128, 11008, True, 151936, 32768, 1e-6),
    "qwen2_5_7b": (28, 3584, 28, 4, 128, 18944, False, 152064, 131072, 1e-6),
    "qwen2_5_14b": (48, 5120, 40, 8, 128, 13824, False, 152064, 131072, 1e-5),
    "qwen2_5_32b": (64, 5120, 40, 8, 128, 27648, False, 152064, 131072, 1e-5),
    "qwen2_5_72b": (80, 8192, 64, 8, 128, 29568, False, 152064, 131072, 1e-5),
}
# Layers, hidden, query heads, KV heads, channels of a head, experts, top-k, FFN of an expert, of the shared expert, its
# gate, softmax over all experts (norm_topk_prob false), QK norm, bias of QKV.
MOE = {
    "qwen1_5_moe_a2_7b": (24, 2048, 16, 16, 128, 60, 4, 1408, 5632, True, True, False, True),
    "qwen2_57b_a14b": (28, 3584, 28, 4, 128, 64, 8, 2560, 20480, True, True, False, True),
    "qwen3_30b_a3b": (48, 2048, 32, 4, 128, 128, 8, 768, None, False, False, True, False),
    "qwen3_235b_a22b": (94, 4096, 64, 4, 128, 128, 8, 1536, None, False, False, True, False),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    config = RECIPES[name]()
    model = config.model
    assert DENSE[name] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        model.ffn_hidden_size,
        model.share_embeddings_and_output_weights,
        model.vocab_size,
        model.max_position_embeddings,
        model.layernorm_epsilon,
    )
    assert (model.add_qkv_bias, model.qk_layernorm, model.num_moe_experts) == (True, False, None)
    assert model.init_method_std == 0.02


@pytest.mark.parametrize("name", MOE)
def test_mixtures_of_experts(name):
    model = RECIPES[name]().model
    assert MOE[name] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        model.num_moe_experts,
        model.moe_router_topk,
        model.moe_ffn_hidden_size,
        model.moe_shared_expert_intermediate_size,
        model.moe_shared_expert_gate,
        model.moe_router_pre_softmax,
        model.qk_layernorm,
        model.add_qkv_bias,
    )
    assert model.moe_aux_loss_coeff == 0.001
