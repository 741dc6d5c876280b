"""The keys of a GGUF file that describe the model, both ways.

Names and types as llama.cpp reads them (src/llama-arch.cpp, src/models/qwen*.cpp of llama.cpp).
"""

from collections.abc import Mapping
from typing import Any

from checkpoints_convert.formats.gguf.container import Value, float32, text, uint32
from checkpoints_convert.formats.gguf.types import Kind
from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.config import hf_config

ARCHITECTURES = {"qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
MODEL_TYPES = {theirs: ours for ours, theirs in ARCHITECTURES.items()}
# What quantized blocks mean: GGML_QNT_VERSION of ggml.h.
_QUANTIZATION_VERSION = 2
# config.json -> key behind the architecture's name.
_NUMBERS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_EPSILON, _ROPE_BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_HEAD_LENGTHS = ("attention.key_length", "attention.value_length")


def model_keys(architecture: Architecture, kind: Kind, *, name: str, license_: str | None) -> dict[str, Value]:
    """The keys of a model.

    Args:
        architecture: shape and RoPE.
        kind: of the file.
        name: of the model, for people.
        license_: SPDX-like identifier.

    Raises:
        ConversionError: llama.cpp computes another function of these weights.
    """
    require_computable(architecture)
    config = _config(architecture)
    theirs = ARCHITECTURES[config["model_type"]]
    found = {
        "general.architecture": text(theirs),
        "general.type": text("model"),
        "general.name": text(name),
        **({} if license_ is None else {"general.license": text(license_)}),
        "general.file_type": uint32(kind.file_type),
        "general.quantization_version": uint32(_QUANTIZATION_VERSION),
    }
    numbers = _NUMBERS | _numbers_of_experts(config["model_type"])
    found |= {f"{theirs}.{key}": uint32(int(config[field])) for field, key in numbers.items()}
    found[f"{theirs}.{_EPSILON}"] = float32(float(config["rms_norm_eps"]))
    found[f"{theirs}.{_ROPE_BASE}"] = float32(float(config["rope_theta"]))
    if "head_dim" in config:
        found |= {f"{theirs}.{key}": uint32(int(config["head_dim"])) for key in _HEAD_LENGTHS}
    return found


def require_computable(architecture: Architecture) -> None:
    """Raises ConversionError where llama.cpp has no model that computes the same."""
    model, problems = architecture.model, []
    if model.is_moe and model.moe_router_pre_softmax == model.qk_layernorm:
        # The switch norm_w of build_moe_ffn is a constant in src/models/qwen2moe.cpp (false) and qwen3moe.cpp (true).
        must = "true" if model.qk_layernorm else "false"
        fix = f"llama.cpp computes {'Qwen3' if model.qk_layernorm else 'Qwen2'}-MoE with norm_topk_prob = {must} only."
        problems.append(Problem("norm_topk_prob", str(not model.moe_router_pre_softmax).lower(), fix))
    width = model.num_attention_heads * model.head_dim
    if not model.qk_layernorm and width != model.hidden_size:
        fix = f"times {model.head_dim} channels must be hidden_size = {model.hidden_size} in llama.cpp's Qwen2 models."
        problems.append(Problem("num_attention_heads", model.num_attention_heads, fix))
    if problems:
        raise ConversionError(problems)


def config_of(keys: Mapping[str, Any], *, vocab_size: int, tied: bool, biased: bool, where: str) -> dict[str, Any]:
    """config.json of the model that a file describes.

    Args:
        keys: contents of the file's keys by name.
        vocab_size: rows of the embedding.
        tied: whether there is no ``output.weight``.
        biased: whether Q, K and V have a bias.
        where: the file, for messages.

    Raises:
        ConversionError: of another family of models, or a key is missing or of another type.
    """
    theirs = keys.get("general.architecture")
    if not isinstance(theirs, str) or theirs not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        fix = f"is not supported; supported architectures: {known}."
        raise ConversionError(Problem(f"{where}: general.architecture", str(theirs)[:80], fix))
    kind = MODEL_TYPES[theirs]
    problems: list[Problem] = []

    def take(key: str, *types: type) -> Any:
        value = keys.get(f"{theirs}.{key}")
        if not isinstance(value, types) or isinstance(value, bool):
            said = None if value is None else repr(value)[:80]
            problems.append(Problem(f"{where}: {theirs}.{key}", said, "is missing or not a number."))
            return None
        return value

    config: dict[str, Any] = {"model_type": kind, "hidden_act": "silu", "vocab_size": vocab_size}
    numbers = _NUMBERS | _numbers_of_experts(kind)
    config |= {field: take(key, int) for field, key in numbers.items()}
    config["rms_norm_eps"] = _shortest(take(_EPSILON, float))
    config["rope_theta"] = _shortest(take(_ROPE_BASE, float))
    if f"{theirs}.{_HEAD_LENGTHS[0]}" in keys:
        config["head_dim"] = take(_HEAD_LENGTHS[0], int)
    elif kind.startswith("qwen3"):
        take(_HEAD_LENGTHS[0], int)
    problems += [
        Problem(f"{where}: {key}", str(value)[:80], "is not supported: the model needs a RoPE extension.")
        for key, value in keys.items()
        if key.startswith(f"{theirs}.rope.scaling.") and value not in ("none", 1.0)
    ]
    if problems:
        raise ConversionError(problems)
    config["tie_word_embeddings"] = tied
    if kind.endswith("_moe"):
        config["norm_topk_prob"] = kind.startswith("qwen3")
    if kind == "qwen2_moe":
        config["qkv_bias"] = biased
    return config


def _numbers_of_experts(kind: str) -> dict[str, str]:
    if not kind.endswith("_moe"):
        return {}
    return _EXPERTS | (_SHARED_EXPERT if kind == "qwen2_moe" else {})


def _config(architecture: Architecture) -> dict[str, Any]:
    return hf_config(architecture, eos_token_id=None, bos_token_id=None, dtype="")


def _shortest(value: float | None) -> float | None:
    """The decimal number with the fewest digits that is this float32: 1e-06, not 9.999999974752427e-07."""
    import numpy as np

    return None if value is None else float(str(np.float32(value)))


def is_tied(model: ModelConfig) -> bool:
    """Whether a model's file has no ``output.weight``; ``names.gguf_tensors`` says why Qwen2-MoE always has one."""
    return model.share_embeddings_and_output_weights and (model.qk_layernorm or not model.is_moe)
