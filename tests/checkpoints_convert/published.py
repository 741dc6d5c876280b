"""config.json and generation_config.json of published models of the family: their keys and ids, at tiny sizes.

Keys and values are those of the model cards' repositories on the hub; only what makes a model large is replaced.
"""

from typing import Any

_TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    **_TINY,
}
_QWEN2_5 = _QWEN2 | {"use_mrope": False}
_INSTRUCT = {"eos_token_id": 151645, "max_position_embeddings": 32768, "transformers_version": "4.43.1"}
_QWEN2_MOE: dict[str, Any] = {
    **{name: value for name, value in _QWEN2.items() if name != "attention_dropout"},
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 40,
    "sliding_window": 32768,
    "transformers_version": "4.39.0.dev0",
    **_EXPERTS,
}
_QWEN3: dict[str, Any] = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 16,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
_QWEN3_MOE: dict[str, Any] = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    **_EXPERTS,
}
# It has keys that Qwen3's classes do not read, and neither attention_bias nor a bos.
_QWEN3_CODER: dict[str, Any] = {
    **{name: value for name, value in _QWEN3_MOE.items() if name not in ("attention_bias", "bos_token_id")},
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "transformers_version": "4.52.3",
    "use_qk_norm": True,
}
# Published with YaRN, which is refused.
_R1_0528: dict[str, Any] = _QWEN3 | {"max_position_embeddings": 131072}
R1_0528_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "attn_factor": 0.8782488562869419,
}
# As transformers 5 writes the same.
_WRITTEN_BY_5: dict[str, Any] = {
    **{name: value for name, value in _QWEN2_5.items() if name not in ("torch_dtype", "rope_theta")},
    "dtype": "bfloat16",
    "layer_types": ["full_attention", "full_attention"],
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.17.0",
}

_BASE_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": False,
    "eos_token_id": 151643,
    "max_new_tokens": 2048,
    "transformers_version": "4.37.0",
}
_INSTRUCT_GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
_R1_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 151646,
    "eos_token_id": 151643,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.39.3",
}
_CODER_GENERATION = {
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
}
_QWEN3_GENERATION = _INSTRUCT_GENERATION | {"temperature": 0.6, "top_p": 0.95, "transformers_version": "4.51.0"}

Published = tuple[dict[str, Any], dict[str, Any] | None]
MODELS: dict[str, Published] = {
    "Qwen2-7B": (_QWEN2, _BASE_GENERATION),
    "Qwen2-0.5B": (_QWEN2 | {"tie_word_embeddings": True, "max_window_layers": 24}, _BASE_GENERATION),
    "Qwen2-7B-Instruct": (_QWEN2 | {"eos_token_id": 151645, "max_position_embeddings": 32768}, _INSTRUCT_GENERATION),
    "Qwen2.5-0.5B": (
        _QWEN2_5 | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 24},
        _BASE_GENERATION,
    ),
    "Qwen2.5-7B": (_QWEN2_5, _BASE_GENERATION),
    "Qwen2.5-72B": (_QWEN2_5 | {"rms_norm_eps": 1e-05, "max_window_layers": 80}, _BASE_GENERATION),
    "Qwen2.5-7B-Instruct": (_QWEN2 | _INSTRUCT, _INSTRUCT_GENERATION),
    "Qwen2.5-Coder-32B-Instruct": (_QWEN2 | _INSTRUCT | {"max_window_layers": 70}, _INSTRUCT_GENERATION),
    "Qwen2.5-Math-7B": (
        _QWEN2_5 | {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096},
        _BASE_GENERATION,
    ),
    "Qwen2.5-7B-Instruct-1M": (
        _QWEN2
        | _INSTRUCT
        | {
            "dual_chunk_attention_config": {
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
            "max_position_embeddings": 1010000,
            "rope_theta": 10000000.0,
            "sliding_window": 1010000,
        },
        _INSTRUCT_GENERATION,
    ),
    "QwQ-32B": (
        _QWEN2 | {"eos_token_id": 151645, "max_window_layers": 64, "pad_token_id": 151643, "rope_scaling": None},
        _QWEN3_GENERATION,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        _QWEN2_5 | {"rope_theta": 10000, "sliding_window": 4096, "transformers_version": "4.44.0"},
        _R1_GENERATION,
    ),
    "Qwen1.5-MoE-A2.7B": (_QWEN2_MOE | {"max_position_embeddings": 8192, "max_window_layers": 21}, None),
    "Qwen1.5-MoE-A2.7B-Chat": (_QWEN2_MOE | {"eos_token_id": 151645}, _INSTRUCT_GENERATION),
    "Qwen2-57B-A14B-Instruct": (
        _QWEN2_MOE | {"attention_dropout": 0.0, "eos_token_id": 151645, "sliding_window": 65536},
        _INSTRUCT_GENERATION,
    ),
    "Qwen3-0.6B": (_QWEN3 | {"tie_word_embeddings": True, "max_window_layers": 28}, _QWEN3_GENERATION),
    "Qwen3-8B-Base": (_QWEN3 | {"eos_token_id": 151643, "max_position_embeddings": 32768}, _BASE_GENERATION),
    "Qwen3-30B-A3B": (_QWEN3_MOE, _QWEN3_GENERATION),
    "Qwen3-30B-A3B-Instruct-2507": (
        _QWEN3_MOE | {"max_position_embeddings": 262144, "rope_theta": 10000000},
        _QWEN3_GENERATION,
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (_QWEN3_CODER, _CODER_GENERATION),
    "DeepSeek-R1-0528-Qwen3-8B, without YaRN": (_R1_0528, None),
    "Qwen2.5-1.5B, saved by transformers 5": (_WRITTEN_BY_5 | {"tie_word_embeddings": True}, _BASE_GENERATION),
}
