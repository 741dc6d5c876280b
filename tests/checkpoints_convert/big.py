"""A model large enough that a conversion of it can be interrupted."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_qwen.hf.config import architecture_from_hf, hf_config
from megatron_qwen.hf.mapping import hf_tensors
from megatron_qwen.recipes.registry import RECIPES

SHARD_BYTES = 5_000_000
_LAYERS, _HIDDEN, _FFN, _VOCABULARY = 12, 512, 1792, 16_000


def big_model(directory: Path) -> Path:
    """About 100 MB of random bf16 weights of a Qwen2.5 shape."""
    base = RECIPES["qwen2_5_0_5b"]().architecture
    content = hf_config(base, eos_token_id=0, bos_token_id=0, dtype="bfloat16")
    content |= {"num_hidden_layers": _LAYERS, "hidden_size": _HIDDEN, "intermediate_size": _FFN}
    content |= {"vocab_size": _VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = architecture_from_hf(content, where="config.json").model
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        item.name: torch.randn(item.shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        for item in hf_tensors(model)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
