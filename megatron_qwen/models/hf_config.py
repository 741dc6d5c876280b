"""A model's shape as Hugging Face's config.json."""

from typing import Any

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem


def hf_config(model: ModelConfig, *, eos_token_id: int | None, bos_token_id: int | None, dtype: str) -> dict[str, Any]:
    """config.json of Qwen2ForCausalLM or Qwen2MoeForCausalLM.

    Args:
        model: the shape.
        eos_token_id: id that ends a document.
        bos_token_id: id that begins one.
        dtype: torch's name of the weights' format.

    Raises:
        ConversionError: these classes cannot express the shape.
    """
    inexpressible = []
    if not model.add_qkv_bias:
        inexpressible.append(Problem("model.add_qkv_bias", "false", "Qwen2 models always have this bias."))
    if model.is_moe and not model.moe_shared_expert_gate:
        fix = "Qwen2-MoE models always have a shared expert with a gate; this one has no such class."
        inexpressible.append(Problem("model.moe_shared_expert_gate", "false", fix))
    if inexpressible:
        raise ConversionError(inexpressible)
    architecture = "Qwen2MoeForCausalLM" if model.is_moe else "Qwen2ForCausalLM"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen2_moe" if model.is_moe else "qwen2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "use_sliding_window": False,
        "use_cache": True,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_dropout": model.attention_dropout,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    if model.is_moe:
        config |= {
            "num_experts": model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
            "output_router_logits": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config
