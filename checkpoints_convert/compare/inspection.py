"""``mq convert inspect``: what is in a checkpoint, without reading the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.checkpoint_source import choose, read_state
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.common_state import read_common_state
from megatron_qwen.checkpoint.lora_base import noted
from megatron_qwen.checkpoint.paths import MANIFEST, STATE
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.errors import Problem

# By what a tensor's name holds, the part of the model it belongs to; the first that fits.
_PARTS = (
    ("optimizer.", "optimizer state"),
    ("word_embeddings", "embedding"),
    ("output_layer", "output matrix"),
    ("layernorm", "norms"),
    ("layer_norm", "norms"),
    ("self_attention", "attention"),
    (".experts.", "routed experts"),
    ("shared_experts", "shared expert"),
    ("router", "router"),
    (".mlp.", "feed-forward"),
)
_SIZES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}


@dataclass(frozen=True)
class TensorRow:
    """A tensor, or a part of the model.

    Args:
        name: of it.
        shape: of a tensor; empty for a part.
        dtype: formats in it.
        values: how many.
        size: bytes.
        slices: stored slices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: int
    size: int
    slices: int


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Args:
        path: its directory.
        iteration: its number.
        layout: that wrote it, as far as it is noted.
        facts: what else is noted: ranks, tokens, code, whether there is a manifest.
        tensors: every tensor.
        parts: the tensors by part of the model.
    """

    path: Path
    iteration: int
    layout: str
    facts: dict[str, Any]
    tensors: list[TensorRow]
    parts: list[TensorRow]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": str(self.path),
            "iteration": self.iteration,
            "layout": self.layout,
            **self.facts,
            "parts": [vars(row) for row in self.parts],
            "tensors": [vars(row) for row in self.tensors],
        }

    def __str__(self) -> str:
        weights = sum(row.values for row in self.parts if row.name != "optimizer state")
        head = [f"{self.path}", f"iteration {self.iteration:,}, written under {self.layout}"]
        head += [f"{name}: {value}" for name, value in self.facts.items() if value is not None]
        return "\n".join(
            [
                *head,
                "",
                *_table(self.tensors, "tensor"),
                "",
                *_table(self.parts, "part"),
                f"{weights:,} values of weights",
            ]
        )


def inspect(path: Path, *, iteration: int | None = None) -> Inspection:
    """Reads the metadata of a checkpoint, ours or Megatron-LM's.

    Raises:
        CheckpointError: there is none, or its metadata is damaged or refused.
    """
    chosen = choose(path, iteration)
    reader = CheckpointReader(chosen.path)
    tensors = [
        TensorRow(
            name,
            info.shape,
            str(info.dtype).removeprefix("torch."),
            torch.Size(info.shape).numel(),
            torch.Size(info.shape).numel() * info.dtype.itemsize,
            len(reader.chunks(name)),
        )
        for name, info in sorted(reader.tensors().items())
    ]
    layout, facts = _noted(chosen.path, tensors)
    return Inspection(chosen.path, chosen.iteration, layout, facts, tensors, _by_part(tensors))


def _noted(directory: Path, tensors: list[TensorRow]) -> tuple[str, dict[str, Any]]:
    facts: dict[str, Any] = {}
    if (directory / MANIFEST).is_file():
        entries = manifest.read(directory)
        facts["manifest"] = entries.fix if isinstance(entries, Problem) else f"{len(entries)} files"
    else:
        facts["manifest"] = "none: damage to the files cannot be detected"
    if (directory / STATE).is_file():
        state = read_state(directory)
        progress, code = state.get("progress", {}), state.get("code") or {}
        facts |= {
            "ranks": state.get("world_size"),
            "tokens": progress.get("consumed_tokens"),
            "code": code.get("commit") or code.get("version"),
            "torch": state.get("torch"),
            "adapters for the weights of": None if (base := noted(state)) is None else base.path,
        }
        sizes = {short: state.get("layout", {}).get(name) or 1 for name, short in _SIZES.items()}
        return _layout(sizes), facts
    arguments = getattr(read_common_state(directory).get("args"), "__dict__", {})
    if arguments:
        samples, length = arguments.get("consumed_train_samples"), arguments.get("seq_length")
        if isinstance(samples, int) and isinstance(length, int):
            facts["tokens"] = samples * length
        sizes = {short: arguments.get(name) for name, short in _SIZES.items()}
        return _layout({name: size if isinstance(size, int) else 1 for name, size in sizes.items()}), facts
    return _guessed(tensors), facts


def _layout(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one device"


def _guessed(tensors: list[TensorRow]) -> str:
    """From the slices of the embedding, the tensor parallel size; the rest leaves no trace."""
    embedding = next((row for row in tensors if row.name == "embedding.word_embeddings.weight"), None)
    return "an unknown layout" if embedding is None else f"TP{embedding.slices}, the rest unknown"


def _by_part(tensors: list[TensorRow]) -> list[TensorRow]:
    parts: dict[str, list[TensorRow]] = {}
    for row in tensors:
        name = next((part for mark, part in _PARTS if mark in row.name), "other")
        parts.setdefault(name, []).append(row)
    order = [part for _, part in _PARTS] + ["other"]
    return [
        TensorRow(
            name,
            (),
            ", ".join(sorted({row.dtype for row in parts[name]})),
            sum(row.values for row in parts[name]),
            sum(row.size for row in parts[name]),
            sum(row.slices for row in parts[name]),
        )
        for name in dict.fromkeys(order)
        if name in parts
    ]


def _table(rows: list[TensorRow], title: str) -> list[str]:
    width = max(len(title), *(len(row.name) for row in rows)) if rows else len(title)
    lines = [f"{title:<{width}}  {'shape':<24}{'format':<18}{'values':>18}{'MB':>14}{'slices':>8}"]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"{row.name:<{width}}  {shape:<24}{row.dtype:<18}{row.values:>18,}{row.size / 1e6:>14,.2f}{row.slices:>8,}"
        )
    return lines
