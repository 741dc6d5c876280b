"""Small models that differ in what decides the types of a GGUF file's tensors, and their directories.

Values are sums of whole numbers, which every machine draws alike, so that bytes made of them can be recorded.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints_convert.formats.gguf.mixture import is_quantized
from checkpoints_convert.formats.gguf.names import gguf_tensors
from megatron_qwen.data.tokenizers.making import train_bpe
from megatron_qwen.hf.config import ARCHITECTURES, architecture_from_hf
from megatron_qwen.hf.mapping import hf_tensors

_DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50_000.0,
    "tie_word_embeddings": False,
}
_TIED = {"tie_word_embeddings": True}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": _DENSE,
    # Four query heads a KV head.
    "qwen2 tied": _DENSE | _TIED | {"num_attention_heads": 8, "num_hidden_layers": 3},
    # No width is a multiple of 256, as in the 0.5B.
    "qwen2 narrow": _DENSE
    | _TIED
    | {
        "hidden_size": 224,
        "intermediate_size": 608,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
    },
    # What llama.cpp calls 70B.
    "qwen2 of 80 layers": _DENSE | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 80},
    # Heads together wider than the model, as in Qwen3.
    "qwen3": _DENSE | {"model_type": "qwen3", "num_attention_heads": 6, "head_dim": 64, "num_hidden_layers": 4},
    # transformers takes 128 for the width of a Qwen3 head, whatever a file says.
    "qwen3 tied": _DENSE | _TIED | {"model_type": "qwen3", "head_dim": 128, "num_hidden_layers": 2},
    # Eight experts, which llama.cpp treats as Mixtral's.
    "qwen2_moe": _DENSE
    | _EXPERTS
    | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 256, "norm_topk_prob": False},
    # The output is not tied in llama.cpp.
    "qwen2_moe tied": _DENSE
    | _EXPERTS
    | _TIED
    | {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
        "qkv_bias": False,
    },
    "qwen3_moe": _DENSE
    | _EXPERTS
    | {
        "model_type": "qwen3_moe",
        "num_experts": 12,
        "moe_intermediate_size": 96,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
}
# transformers 5.24 takes the widths of experts and shared experts from its defaults: those of
# Qwen1.5-MoE-A2.7B and Qwen3-30B-A3B, whatever a file says.
OF_TRANSFORMERS_WIDTHS = {
    "qwen2_moe of its widths": MODELS["qwen2_moe"]
    | {"shared_expert_intermediate_size": 5632, "moe_intermediate_size": 1408},
    "qwen3_moe of its widths": MODELS["qwen3_moe"] | {"moe_intermediate_size": 768},
}
TEXT = Path(__file__).parents[4] / "docs" / "architecture.md"


def make(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, vocab_size: int = 600) -> Path:
    """A model's directory with config.json, weights and a tokenizer."""
    config = {**MODELS, **OF_TRANSFORMERS_WIDTHS}[name]
    directory.mkdir(parents=True, exist_ok=True)
    stated = {"architectures": [ARCHITECTURES[config["model_type"]]], "eos_token_id": 0, **config}
    (directory / "config.json").write_text(json.dumps(stated))
    model = architecture_from_hf(config, where=name).model
    generator = torch.Generator().manual_seed(7)
    weights = {item.name: _values(item.name, item.shape, generator).to(dtype) for item in hf_tensors(model)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    train_bpe([TEXT.read_text()], directory, vocab_size=vocab_size)
    return directory


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values around 0, of norms around 1; nearly normal."""
    drawn = torch.zeros(shape)
    for _ in range(4):
        drawn += torch.randint(0, 1 << 12, shape, generator=generator).float()
    normal = (drawn - (1 << 13)) / (1 << 11)  # a standard deviation of 1.15
    if len(shape) == 1:
        return normal / 8 + (0.0 if name.endswith("bias") else 1.0)
    return normal / (4 if "embed" in name else shape[-1] ** 0.5)


def importances(name: str) -> dict[str, torch.Tensor]:
    """An importance matrix of a model: of every tensor of a file that llama.cpp's own tool collects it for."""
    model = architecture_from_hf(MODELS[name], where=name).model
    generator = torch.Generator().manual_seed(3)
    found = {}
    for tensor in gguf_tensors(model):
        if tensor.name.startswith("blk.") and is_quantized(tensor):
            experts = len(tensor.sources)
            shape = (tensor.columns,) if experts == 1 else (experts, tensor.columns)
            found[tensor.name] = torch.randint(1, 1 << 10, shape, generator=generator).float() / 512
    return found
