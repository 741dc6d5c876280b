"""Keys of a config.json beside the architecture: they are kept as they were, and named if they may have an effect."""

import re
from collections.abc import Mapping
from typing import Any

# What a checkpoint, its conversion or the tokenizer decides anew. Of a key with two spellings, both are here.
_DECIDED = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim"),
        *("tie_word_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("shared_expert_intermediate_size", "norm_topk_prob", "qkv_bias", "hidden_act", "rope_theta"),
        *("rope_parameters", "rope_scaling", "use_sliding_window", "attention_bias", "decoder_sparse_step"),
        *("mlp_only_layers", "layer_types", "quantization_config", "torch_dtype", "dtype"),
        *("initializer_range", "attention_dropout", "router_aux_loss_coef"),
    )
)
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
# What no class of the family computes with: bookkeeping, defaults of transformers' base class, and the window that
# use_sliding_window = false switches off. From published directories of the family and transformers 4.37 to 5.
_NO_EFFECT = frozenset(
    (
        *("transformers_version", "_name_or_path", "_commit_hash", "use_cache", "output_router_logits"),
        *("max_window_layers", "sliding_window", "attn_implementation", "_attn_implementation", "tokenizer_class"),
        *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "pruned_heads"),
        *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention"),
        *("cross_attention_hidden_size", "tie_encoder_decoder", "finetuning_task", "id2label", "label2id"),
        *("num_labels", "problem_type", "prefix", "task_specific_params", "decoder_start_token_id", "sep_token_id"),
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "diversity_penalty", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("tf_legacy_loss", "unsloth_version", "unsloth_fixed", "pretraining_tp", "keys_to_ignore_at_inference"),
        *("_attn_implementation_autoset", "_experts_implementation", "_from_model_config", "model_max_length"),
        *("gradient_checkpointing", "eos_token"),  # the text of the token, which gptqmodel notes
    )
)
# Others that have no effect with these values.
_NO_EFFECT_AS: dict[str, tuple[Any, ...]] = {"use_mrope": (False, None), "mlp_bias": (False, None)}
# A name on the hub: a model, or OWNER/MODEL.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Relative paths that would be a name on the hub otherwise: where trainers write, such as OUTPUT/checkpoint-500.
_OUTPUT = re.compile(r"(output|result|run|model|checkpoint)s?/.*|(.*/)?checkpoint[-_]?\d+", re.IGNORECASE)


def is_local_path(name: str) -> bool:
    """Whether a name that transformers noted of a model is a path of the machine where it was loaded or saved."""
    return bool(name) and (_HUB_NAME.fullmatch(name) is None or _OUTPUT.fullmatch(name) is not None)


def kept_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """What an export repeats. A path of the machine where the directory was made is not repeated."""
    return {
        name: value
        for name, value in content.items()
        if name not in _DECIDED and not (name == "_name_or_path" and isinstance(value, str) and is_local_path(value))
    }


def keys_with_effect(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of these, what may change what a model computes and is not computed here."""
    # Some programs that convert models note it; Qwen3's classes normalise queries and keys, Qwen2's do not.
    without = _NO_EFFECT_AS | {"use_qk_norm": (str(content.get("model_type")).startswith("qwen3"),)}
    return {
        name: value
        for name, value in kept_keys(content).items()
        if name not in _NO_EFFECT and name not in IDS and value is not None and value not in without.get(name, ())
    }


def in_spelling_of(config: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """An export's config.json under the names, and in the order, that the source's has.

    Args:
        config: of the export: what is decided anew, and what is kept.
        content: config.json of the source.
    """
    config = dict(config)
    if "dtype" in content:
        config["dtype"] = config["torch_dtype"] if "torch_dtype" in content else config.pop("torch_dtype")
    if isinstance(content.get("rope_parameters"), dict):
        base = {"rope_theta": config["rope_theta"]} if "rope_theta" in content["rope_parameters"] else {}
        config["rope_parameters"] = content["rope_parameters"] | base
    if "num_local_experts" in content and "num_experts" in config:
        config["num_local_experts"] = config["num_experts"]
    # The others were accepted only with the value that the architecture has, or the class of the model has no use for
    # them, such as qkv_bias in Qwen3.
    config |= {name: value for name, value in content.items() if name in _DECIDED and name not in config}
    first = [name for name in content if name in config]
    return {name: config[name] for name in [*first, *(name for name in config if name not in first)]}
