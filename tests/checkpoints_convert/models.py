"""Random models of every architecture as Hugging Face directories, made by transformers."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

# Sizes that nothing divides by chance: three layers, five KV groups, heads wider than hidden / heads, 330 tokens.
_ODD: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "head_dim": 16,
}
# Sizes that TP 4, PP 4 and VPP 2 divide.
_EVEN: dict[str, Any] = _ODD | {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
_EXPERTS: dict[str, Any] = {
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
# Experts that EP 4 divides, few: with tensor parallelism megatron-core computes them one by one.
_FEW = _EXPERTS | {"num_experts": 8}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 40}

# name -> (transformers' model type, fields of its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 odd": ("qwen2", _ODD),
    "qwen2 odd tied": ("qwen2", _ODD | {"tie_word_embeddings": True}),
    "qwen2 even": ("qwen2", _EVEN),
    "qwen2 even tied": ("qwen2", _EVEN | {"tie_word_embeddings": True}),
    "qwen3 odd": ("qwen3", _ODD),
    "qwen3 even tied": ("qwen3", _EVEN | {"tie_word_embeddings": True}),
    "qwen2_moe odd": ("qwen2_moe", _ODD | _EXPERTS | _SHARED),
    "qwen2_moe even": ("qwen2_moe", _EVEN | _FEW | _SHARED | {"norm_topk_prob": True}),
    "qwen3_moe odd": ("qwen3_moe", _ODD | _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe even": ("qwen3_moe", _EVEN | _FEW | {"norm_topk_prob": True}),
}


def make(
    name: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "50GB", loud: bool = False
) -> Path:
    """Saves a random model of ``MODELS``; ``loud`` gives it weights whose logits differ from token to token."""
    kind, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **fields, **({"initializer_range": 0.2} if loud else {}))
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that are all alike would hide a swap
                centre = 0.0 if "bias" in parameter_name else 1.0
                parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def with_tokenizer(directory: Path, tokenizer: Path) -> Path:
    """Puts a tokenizer's files into a model's directory."""
    for path in tokenizer.iterdir():
        shutil.copyfile(path, directory / path.name)
    return directory
