"""Directories of quantized weights written by hand, one word after the other, as their formats' descriptions say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints_convert.formats.quantized_format import is_quantized

LAYERS = 2
_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _EXPERTS | {"norm_topk_prob": True},
}


def source_model(directory: Path, kind: str = "qwen2", *, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Path:
    """A random model whose logits differ from token to token."""
    fields = _SIZES | KINDS[kind] | {"initializer_range": 0.12} | sizes
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_((0.0 if "bias" in name else 1.0) + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@dataclass
class Codes:
    """A weight on a grid, before it is packed: value (code - zero) x scale.

    ``codes`` [out, in], ``scales`` and ``zeros`` [out, groups], ``group_of`` [in].
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray

    def values(self) -> np.ndarray:
        apart = self.codes.astype(np.float32) - self.zeros[:, self.group_of].astype(np.float32)
        return apart * self.scales[:, self.group_of].astype(np.float32)


def nearest(weight: np.ndarray, *, bits: int, group: int, symmetric: bool, group_of: np.ndarray | None = None) -> Codes:
    """Round to nearest, a loop over groups."""
    rows, columns = weight.shape
    group_of = np.arange(columns) // group if group_of is None else group_of
    count, high = int(group_of.max()) + 1, (1 << bits) - 1
    scales, zeros = np.zeros((rows, count), np.float16), np.zeros((rows, count), np.int64)
    codes = np.zeros((rows, columns), np.int64)
    for one in range(count):
        inside = group_of == one
        part = weight[:, inside]
        if symmetric:
            scale = np.abs(part).max(1) / (high / 2)
            zeros[:, one] = 1 << (bits - 1)
        else:
            low, top = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (top - low) / high
            zeros[:, one] = np.clip(np.rint(-low / np.maximum(scale, 1e-4)), 0, high)
        scales[:, one] = np.maximum(scale, 1e-4)
        exact = part / scales[:, one : one + 1].astype(np.float32)
        codes[:, inside] = np.clip(np.rint(exact) + zeros[:, one : one + 1], 0, high)
    return Codes(codes, scales, zeros, group_of)


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """Words along the last dimension, low bits first; the last word is filled with zeros."""
    per_word = 32 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_word)))
    words = np.zeros((values.shape[0], values.shape[1] // per_word), np.uint32)
    for place in range(per_word):
        words |= values[:, place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


@dataclass
class Written:
    """How a directory is written.

    Args:
        method: ``gptq``, ``awq``, ``pack``, ``int8``, ``fp8`` (compressed-tensors) or ``fp8-block``.
        bits: of a code.
        group: columns that share a scale.
        symmetric: zero is the middle code.
        version: checkpoint_format of GPTQ.
        act_order: columns in random groups (GPTQ, pack-quantized).
        strategy: of compressed-tensors.
        block: of FP8.
        tamper: changes codes, scales or zeros before they are packed.
        settings: fields of quantization_config that are replaced.
    """

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    version: str = "gptq"
    act_order: bool = False
    strategy: str = "group"
    block: tuple[int, int] = (48, 40)
    tamper: Callable[[Codes], Any] = lambda codes: None
    settings: dict[str, Any] = field(default_factory=dict)


def write(source: Path, out: Path, how: Written) -> dict[str, torch.Tensor]:
    """Writes ``out``; returns the weights it stands for."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    meaning: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if not is_quantized(name):
            stored[name] = meaning[name] = tensor.half() if how.method in ("gptq", "awq") else tensor
            continue
        parts, meaning[name] = _quantized(tensor.float().numpy(), how, seed=number)
        stored |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = _config(how, sorted(tensors)) | how.settings
    (out / "config.json").write_text(json.dumps(config))
    return meaning


def _quantized(weight: np.ndarray, how: Written, *, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    if how.method.startswith("fp8"):
        return _fp8(torch.from_numpy(weight), how)
    group_of = None
    if how.act_order:
        group_of = np.random.default_rng(seed).permutation(np.arange(columns) // how.group)
    group = columns if how.strategy == "channel" or how.group == -1 else how.group
    found = nearest(weight, bits=how.bits, group=group, symmetric=how.symmetric, group_of=group_of)
    how.tamper(found)
    meaning = torch.from_numpy(found.values())
    scales, index = torch.from_numpy(found.scales), torch.from_numpy(found.group_of.astype(np.int32))
    middle = 1 << (how.bits - 1)
    if how.method == "gptq":
        minus = 1 if how.version == "gptq" else 0
        return {
            "qweight": packed(found.codes.T.reshape(columns // (32 // how.bits), -1, rows).transpose(0, 2, 1)
                              .reshape(-1, 32 // how.bits), how.bits).view(-1, rows),
            "qzeros": packed(found.zeros.T - minus, how.bits),
            "scales": scales.T,
            "g_idx": index,
        }, meaning  # fmt: skip
    if how.method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def shuffled(values: np.ndarray) -> torch.Tensor:
            return packed(values.reshape(values.shape[0], -1, 8)[:, :, order].reshape(values.shape), 4)

        return {"qweight": shuffled(found.codes.T), "qzeros": shuffled(found.zeros.T), "scales": scales.T}, meaning
    if how.method == "int8":
        parts = {"weight": torch.from_numpy((found.codes - middle).astype(np.int8)), "weight_scale": scales}
        if not how.symmetric:
            parts["weight_zero_point"] = torch.from_numpy((found.zeros - middle).astype(np.int8))
        return parts, meaning
    parts = {"weight_packed": packed(found.codes, how.bits), "weight_scale": scales}
    parts["weight_shape"] = torch.tensor([rows, columns])
    if how.act_order:
        parts["weight_g_idx"] = index
    if not how.symmetric:
        parts["weight_zero_point"] = packed(found.zeros.T, how.bits).T
    return parts, meaning


def _fp8(weight: torch.Tensor, how: Written) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    block = how.method == "fp8-block" or how.strategy == "block"
    sizes = {"tensor": (rows, columns), "channel": (1, columns)}
    height, width = how.block if block else sizes[how.strategy]
    scales = torch.zeros(-(-rows // height), -(-columns // width))
    codes, meaning = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            meaning[place] = codes[place] * scales[i, j]
    name = "weight_scale_inv" if how.method == "fp8-block" else "weight_scale"
    if how.strategy == "tensor":
        scales = scales.view(1)
    return {"weight": codes.to(torch.float8_e4m3fn), name: scales}, meaning


def _config(how: Written, names: list[str]) -> dict[str, Any]:
    common = {"bits": how.bits, "group_size": how.group}
    if how.method == "gptq":
        told = {"desc_act": how.act_order, "sym": how.symmetric, "checkpoint_format": how.version}
        return {"quant_method": "gptq", **common, **told, "damp_percent": 0.01, "true_sequential": True}
    if how.method == "awq":
        told = {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["lm_head"]}
        return {"quant_method": "awq", **common, **told}
    left_out = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and not is_quantized(name)]
    if how.method == "fp8-block":
        told = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(how.block)}
        return {"quant_method": "fp8", **told, "modules_to_not_convert": left_out}
    kinds = {"pack": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
    weights: dict[str, Any] = {
        "num_bits": 8 if how.method == "fp8" else how.bits,
        "type": "float" if how.method == "fp8" else "int",
        "symmetric": how.symmetric,
        "strategy": how.strategy,
        "dynamic": False,
        "actorder": "group" if how.act_order else None,
        "group_size": how.group if how.strategy == "group" else None,
        "block_structure": list(how.block) if how.strategy == "block" else None,
    }
    inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights}
    if how.method != "pack":
        group["input_activations"] = inputs
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[how.method],
        "config_groups": {"group_0": group},
        "ignore": [name for name in left_out if "norm" not in name and "embed" not in name],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
