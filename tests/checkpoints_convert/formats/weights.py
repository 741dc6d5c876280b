"""Weights for tests of formats, a format's tensors of them, and models whose widths fit groups of 128."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoints_convert.formats.quantized_format import QuantizedFormat
from checkpoints_convert.model_source import open_model_source
from checkpoints_convert.quantize.run import Quantized, QuantizeOptions, quantize
from tests.checkpoints_convert import models

_FITTING: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    # Logits of rms 0.6: large enough to tell models apart, small enough that rounding is not amplified.
    "initializer_range": 0.05,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
FITTING_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 fitting": ("qwen2", _FITTING),
    "qwen3 fitting tied": ("qwen3", _FITTING | {"tie_word_embeddings": True}),
    "qwen2_moe fitting": ("qwen2_moe", _FITTING | _EXPERTS | {"shared_expert_intermediate_size": 256}),
    "qwen3_moe fitting": ("qwen3_moe", _FITTING | _EXPERTS | {"norm_topk_prob": True}),
}


def fitting_model(name: str, directory: Path) -> Path:
    """A random model of ``FITTING_MODELS`` as a Hugging Face directory."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "MODELS", FITTING_MODELS)
        return models.make(name, directory)


def quantized(source: Path, out: Path, format_: QuantizedFormat, **options: Any) -> Quantized:
    how = QuantizeOptions(**{"method": "nearest", "quiet": True, **options})
    return quantize(open_model_source(source), out, format_, how)


def weight(rows: int = 48, columns: int = 256) -> torch.Tensor:
    """Random, with a row of zeros, a group of zeros and a large value; bf16."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    values[3] = 0
    values[5, 128:256] = 0
    values[7, 9] = 4.0
    return values.bfloat16()


def encoded(format_: QuantizedFormat, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A format's tensors of a weight, as a file has them: by the last component of their names."""
    encoding = format_.encoding()
    found = {}
    parts = encoding.encode(values, name="w")
    for part, made in encoding.tensors(tuple(values.shape)).items():
        tensor = parts[part] if made.value is None else made.value()
        assert (tuple(tensor.shape), tensor.dtype) == (made.shape, made.dtype), part
        found[part or "weight"] = tensor.contiguous()
    return found


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(5, 45)[None]).logits
    return found.float()


def loaded(directory: Path, *, dtype: torch.dtype = torch.float32, **more: Any) -> transformers.PreTrainedModel:
    """By transformers, which must find every tensor that it looks for, and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, **more
    )
    assert not {kind: keys for kind, keys in report.items() if keys}, report
    return model


def with_weights(directory: Path, weights: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """The model of an unquantized directory with other values in some of its weights, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)
    return model


def of_values(hf: Path, values: dict[str, torch.Tensor], *, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model of other values: transformers' own loader puts experts into the tensors that its classes have."""
    there = hf.with_name("dequantized")
    shutil.copytree(hf, there)
    save_file(values, there / "model.safetensors", metadata={"format": "pt"})
    return loaded(there, dtype=dtype)
