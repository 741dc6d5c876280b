"""Small models whose activations are correlated and have outlying channels, as those of trained models do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoints_convert.hf_directory import HfDirectory
from checkpoints_convert.quantize.calibration_data import Samples
from checkpoints_convert.quantize.calibration_source import CalibrationSource, calibration_source
from tests.conftest import made_once

VOCABULARY = 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", _SIZES | {"tie_word_embeddings": True}),
    "qwen2 full heads": ("qwen2", _SIZES | {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", _SIZES),
    "qwen2_moe": ("qwen2_moe", _SIZES | _EXPERTS | {"shared_expert_intermediate_size": 128}),
    "qwen3_moe": ("qwen3_moe", _SIZES | _EXPERTS | {"norm_topk_prob": True}),
}


def tokens(count: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Text of a language in which a token mostly decides the next one, [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, length), generator=generator)
    keep = torch.rand(count, length, generator=generator) < 0.8
    for at in range(1, length):
        ids[:, at] = torch.where(keep[:, at], (ids[:, at - 1] * 5 + 17) % VOCABULARY, ids[:, at])
    return ids


def make(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, steps: int = 0) -> Path:
    """Saves a model of ``MODELS`` with a few channels of the norms that stand out, trained for some steps.

    Without steps its matrices have a spectrum that falls by two orders, which correlates what they compute.
    """
    kind, fields = MODELS[name]
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **fields, initializer_range=0.05)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "layernorm" in parameter_name:
                parameter[torch.randperm(len(parameter))[:6]] *= 12
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif not steps and "_proj" in parameter_name:
                width = parameter.shape[-1]
                rotation = torch.linalg.qr(torch.randn(width, width)).Q
                parameter.copy_(parameter @ (rotation * torch.logspace(0.5, -1.5, width)) @ rotation.t())
    _train(model, steps)
    model.to(dtype).save_pretrained(directory)
    return directory


def _train(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = tokens(4, 64, seed=1000 + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def made(name: str, factory: pytest.TempPathFactory) -> Path:
    """A model of ``MODELS``, made once for all tests."""
    return made_once(factory, f"trained {name}", lambda directory: make(name, directory))


def opened(directory: Path) -> CalibrationSource:
    """The model as a source of calibration."""
    return calibration_source(HfDirectory(directory))


def samples(count: int = 16, length: int = 64, *, seed: int = 1) -> Samples:
    """Calibration data in the language of the models."""
    return Samples(tokens(count, length, seed=seed), "made up")


def logits(directory: Path, ids: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of a saved model by transformers, [n, length, vocabulary], with some weights replaced."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if weights:
        put(model, weights)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Replaces weights of a model of transformers, by their names in a file; experts are stacked in the model."""
    there = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if ".experts." not in name:
                there[name].copy_(value)
                continue
            before, _, after = name.partition(".experts.")
            index, kind = after.split(".")[:2]
            if kind == "down_proj":
                there[f"{before}.experts.down_proj"][int(index)] = value
                continue
            both = there[f"{before}.experts.gate_up_proj"][int(index)]
            both.view(2, -1, both.shape[1])[int(kind == "up_proj")] = value


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of two sets of logits, in nats."""
    first, second = (one.float().log_softmax(-1) for one in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())
