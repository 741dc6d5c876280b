"""Converts a model's architecture to Hugging Face's config.json, and back."""

from typing import Any

from megatron_qwen.config.checks import rope_problems
from megatron_qwen.config.fields import bound_problems
from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig, RopeConfig
from megatron_qwen.errors import ConversionError, Problem

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# config.json -> ModelConfig, with the type that the value must have.
_FIELDS: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("ffn_hidden_size", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_attention_heads", int),
    "num_key_value_heads": ("num_query_groups", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rms_norm_eps": ("layernorm_epsilon", float),
    "tie_word_embeddings": ("share_embeddings_and_output_weights", bool),
}
_EXPERT_FIELDS: dict[str, tuple[str, type]] = {
    "num_experts": ("num_moe_experts", int),
    "num_experts_per_tok": ("moe_router_topk", int),
    "moe_intermediate_size": ("moe_ffn_hidden_size", int),
}
_OPTIONAL: dict[str, tuple[str, type]] = {
    "initializer_range": ("init_method_std", float),
    "attention_dropout": ("attention_dropout", float),
    "router_aux_loss_coef": ("moe_aux_loss_coeff", float),
}
# Limits far above any real model: a hostile config.json must not make the reader run out of memory.
_LIMITS = {
    "num_hidden_layers": ("num_layers", 10_000),
    "num_attention_heads": ("num_attention_heads", 65_536),
    "num_key_value_heads": ("num_query_groups", 65_536),
    "num_experts": ("num_moe_experts", 65_536),
}

# Fields that must have one of these values, because no other is implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "attention_bias": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "quantization_config": (None,),
}


def hf_config(
    architecture: Architecture, *, eos_token_id: int | list[int] | None, bos_token_id: int | None, dtype: str
) -> dict[str, Any]:
    """config.json of the transformers class that computes the same function.

    Args:
        architecture: the shape and its RoPE.
        eos_token_id: id that ends a document.
        bos_token_id: id that begins one.
        dtype: torch's name of the weights' format.

    Raises:
        ConversionError: no class of the family can express the architecture.
    """
    model, rope = architecture.model, architecture.rope
    kind = _model_type(architecture)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(model, ours) for theirs, (ours, _) in _FIELDS.items()},
        "hidden_act": "silu",
        "initializer_range": model.init_method_std,
        "rope_theta": rope.base,
        "use_sliding_window": False,
        "use_cache": True,
        "attention_dropout": model.attention_dropout,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }
    if model.qk_layernorm or model.head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    if model.qk_layernorm:
        config["attention_bias"] = False
    if model.is_moe:
        config |= {theirs: getattr(model, ours) for theirs, (ours, _) in _EXPERT_FIELDS.items()}
        config |= {
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
            "output_router_logits": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if kind == "qwen2_moe":
        config["shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
        config["qkv_bias"] = model.add_qkv_bias
    return config


def _model_type(architecture: Architecture) -> str:
    model, problems = architecture.model, list(rope_problems(architecture.rope))
    if model.qk_layernorm:
        kind = "qwen3_moe" if model.is_moe else "qwen3"
        if model.add_qkv_bias:
            problems.append(
                Problem(
                    "model.add_qkv_bias",
                    "true",
                    "must be false for a model with qk_layernorm: Qwen3 classes have no QKV bias.",
                )
            )
        if model.moe_shared_expert_intermediate_size is not None:
            fix = "must be null for a model with qk_layernorm: Qwen3-MoE has no shared expert."
            problems.append(
                Problem("model.moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size, fix)
            )
    else:
        kind = "qwen2_moe" if model.is_moe else "qwen2"
        if not model.is_moe and not model.add_qkv_bias:
            problems.append(Problem("model.add_qkv_bias", "false", "must be true: Qwen2 models always have this bias."))
        if model.is_moe and not model.moe_shared_expert_gate:
            fix = "must be true: Qwen2-MoE models always have a shared expert with a gate."
            problems.append(Problem("model.moe_shared_expert_gate", "false", fix))
    if problems:
        raise ConversionError(problems)
    return kind


def architecture_from_hf(content: dict[str, Any], *, where: str) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        content: config.json.
        where: its path, for messages.

    Raises:
        ConversionError: with every field that is missing, has a wrong type, or needs an unsupported feature.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConversionError(
            Problem(f"{where}: model_type", kind, f"is not supported; supported model types: {known}.")
        )
    content = _with_older_names(content)
    required = dict(_FIELDS)
    if kind.startswith("qwen3"):
        required["head_dim"] = ("kv_channels", int)
    if kind.endswith("_moe"):
        required |= _EXPERT_FIELDS
    if kind == "qwen2_moe":
        required["shared_expert_intermediate_size"] = ("moe_shared_expert_intermediate_size", int)
    problems: list[Problem] = []
    shape: dict[str, Any] = {}
    for theirs, (ours, type_) in required.items():
        shape[ours] = _value(content, theirs, type_, where, problems, required=True)
    for theirs, (ours, type_) in _OPTIONAL.items():
        if (value := _value(content, theirs, type_, where, problems, required=False)) is not None:
            shape[ours] = value
    base = _rope_base(content, where, problems)
    if not kind.startswith("qwen3") and content.get("head_dim") is not None:
        shape["kv_channels"] = _value(content, "head_dim", int, where, problems, required=True)
    problems += _not_computed(content, where)
    shape |= _switches(kind, content, where, problems)
    if problems:
        raise ConversionError(problems)
    architecture = Architecture(model=ModelConfig(**shape), rope=RopeConfig(base=base))
    if problems := _illegal(architecture, where):
        raise ConversionError(problems)
    return architecture


def _with_older_names(content: dict[str, Any]) -> dict[str, Any]:
    """Fields that versions of transformers spell differently, under one name."""
    content = dict(content)
    if "num_local_experts" in content:
        content.setdefault("num_experts", content["num_local_experts"])
    return content


def _value(
    content: dict[str, Any], name: str, type_: type, where: str, problems: list[Problem], *, required: bool
) -> Any:
    value = content.get(name)
    if value is None:
        if required:
            problems.append(Problem(f"{where}: {name}", None, "is missing; the model cannot be built without it."))
        return None
    fits = isinstance(value, int | float) if type_ is float else isinstance(value, type_)
    if not fits or (type_ is not bool and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        problems.append(Problem(f"{where}: {name}", repr(value), f"must be {names[type_]}."))
        return None
    try:
        return type_(value)
    except OverflowError:
        problems.append(Problem(f"{where}: {name}", "an integer too large for a float", "must be a smaller number."))
        return None


def _rope_base(content: dict[str, Any], where: str, problems: list[Problem]) -> Any:
    """The base of RoPE, from ``rope_theta`` or transformers 5's ``rope_parameters``."""
    parameters = content.get("rope_parameters")
    if not isinstance(parameters, dict):
        return _value(content, "rope_theta", float, where, problems, required=True)
    for name in ("rope_type", "type"):  # the second is what transformers before 4.45 called it, and is read to this day
        if (kind := parameters.get(name, "default")) != "default":
            fix = "is not supported; convert the model without a RoPE extension."
            problems.append(Problem(f"{where}: rope_parameters.{name}", kind, fix))
    inner, outer = parameters.get("rope_theta"), content.get("rope_theta")
    if inner is None and outer is not None:  # transformers takes it from there
        return _value(content, "rope_theta", float, where, problems, required=True)
    if inner is not None and outer is not None and inner != outer:
        fix = f"differs from rope_parameters.rope_theta = {inner!r}: keep the one that the model was trained with."
        problems.append(Problem(f"{where}: rope_theta", outer, fix))
    return _value(parameters, "rope_theta", float, f"{where}: rope_parameters", problems, required=True)


def _not_computed(content: dict[str, Any], where: str) -> list[Problem]:
    found = [
        Problem(f"{where}: {name}", content[name], f"is not supported; must be {allowed[0]!r}.")
        for name, allowed in _FIXED.items()
        if name in content and content[name] not in allowed
    ]
    if content.get("hidden_act") != "silu":
        found.append(Problem(f"{where}: hidden_act", content.get("hidden_act"), "is required, and must be silu."))
    if content["model_type"].startswith("qwen3"):
        # Qwen3's classes have neither; a published Qwen3-Coder says so. With another value the model is another.
        found += [
            Problem(f"{where}: {name}", content[name], f"is not supported in a Qwen3 model; must be {none!r}.")
            for name, none in (("qkv_bias", False), ("shared_expert_intermediate_size", 0))
            if content.get(name) not in (None, none)
        ]
    layer_types = content.get("layer_types")
    full = isinstance(layer_types, list) and layer_types and all(one == "full_attention" for one in layer_types)
    if layer_types is not None and not full:
        found.append(
            Problem(f"{where}: layer_types", layer_types, "is not supported; every layer must have full_attention.")
        )
    return found


def _switches(kind: str, content: dict[str, Any], where: str, problems: list[Problem]) -> dict[str, Any]:
    """ModelConfig fields that follow from the transformers class."""
    switches: dict[str, Any] = {"qk_layernorm": kind.startswith("qwen3"), "add_qkv_bias": kind.startswith("qwen2")}
    if kind.endswith("_moe"):
        renormalised = _value(content, "norm_topk_prob", bool, where, problems, required=True)
        switches["moe_router_pre_softmax"] = not renormalised
    if kind == "qwen2_moe":
        switches["moe_shared_expert_gate"] = True
        bias = _value(content, "qkv_bias", bool, where, problems, required=False)
        switches["add_qkv_bias"] = bias is not False
    return switches


def _illegal(architecture: Architecture, where: str) -> list[Problem]:
    model = architecture.model
    bounds = (*bound_problems("model", model), *bound_problems("rope", architecture.rope))
    found = [Problem(f"{where}: {item.where}", item.value, item.fix) for item in bounds]
    if found:
        return found
    found += [
        Problem(
            f"{where}: {name}", getattr(model, field), f"is larger than any supported model; must be at most {limit:,}."
        )
        for name, (field, limit) in _LIMITS.items()
        if (getattr(model, field) or 0) > limit
    ]
    if found:
        return found
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        found.append(
            Problem(f"{where}: num_attention_heads", heads, f"must be divisible by num_key_value_heads = {groups}.")
        )
    if model.kv_channels is None and model.hidden_size % heads:
        found.append(
            Problem(f"{where}: hidden_size", model.hidden_size, f"must be divisible by num_attention_heads = {heads}.")
        )
    if model.head_dim % 2:
        found.append(Problem(f"{where}: head_dim", model.head_dim, "must be even."))
    if model.is_moe and model.moe_router_topk > (model.num_moe_experts or 0):
        fix = f"must be at most num_experts = {model.num_moe_experts}."
        found.append(Problem(f"{where}: num_experts_per_tok", model.moe_router_topk, fix))
    return found
