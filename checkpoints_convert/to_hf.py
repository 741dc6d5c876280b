"""``mq convert to-hf``: a checkpoint as a directory that transformers loads."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_qwen.checkpoint import find
from megatron_qwen.checkpoint.paths import RUN_YAML
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.data.tokenizer import TOKENIZER_FILES, special_ids
from megatron_qwen.errors import CheckpointError, ConversionError, Problem
from megatron_qwen.models.hf_config import hf_config
from megatron_qwen.models.hf_mapping import mapped
from megatron_qwen.recipes.registry import RECIPES

log = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def export(
    source: Path,
    out: Path,
    *,
    iteration: int | None,
    dtype: str | None,
    max_shard_bytes: int,
    tokenizer: Path | None = None,
) -> Path:
    """Writes ``out``, which appears only when it is complete.

    Args:
        source: a run directory, a checkpoint root or one iteration.
        out: the directory to make; it must not exist.
        iteration: which checkpoint; None is the newest good one.
        dtype: bf16, fp16 or fp32; None is the format the run computed in.
        max_shard_bytes: size at which a new safetensors file is begun.
        tokenizer: tokenizer directory, where it is not the one that run.yaml names.

    Returns:
        The checkpoint that was exported.

    Raises:
        ConversionError: ``out`` exists, or the checkpoint does not fit its configuration.
        CheckpointError: there is no whole checkpoint.
    """
    if out.exists():
        raise ConversionError(Problem(str(out), None, "exists already; name a new directory or remove it."))
    candidates = find.resolve(source)
    if iteration is not None:
        candidates = [candidate for candidate in candidates if candidate.iteration == iteration]
        if not candidates:
            raise CheckpointError(Problem("--iteration", iteration, f"{source} has no such checkpoint."))
    chosen = find.newest_good(candidates, strict=iteration is not None)
    config = resolve(str(chosen.path / RUN_YAML), [], RECIPES)
    if tokenizer is not None:
        config = config.with_section("data", tokenizer=str(tokenizer))
    target = _DTYPES[dtype or config.precision.dtype]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_configs(config, temporary, dtype=str(target).removeprefix("torch."))
        write_weights(CheckpointReader(chosen.path), config, temporary, dtype=target, max_shard_bytes=max_shard_bytes)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return chosen.path


def write_weights(
    reader: CheckpointReader, config: RunConfig, out: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Streams the tensors into safetensors files and writes their index; memory holds one file's worth."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal shard, size, number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for item in mapped(config.model):
        tensor = reader.read(item.rule.core, leading=item.leading)
        for name, part in zip(item.names, item.rule.split(tensor, config.model), strict=True):
            converted = part.to(dtype).contiguous().clone()
            length = converted.numel() * converted.element_size()
            if shard and size + length > max_shard_bytes:
                flush()
            shard[name] = converted
            size, total = size + length, total + length
    flush()
    _name_shards(out, weight_map, number, total)


def _name_shards(out: Path, weight_map: dict[str, str], count: int, total: int) -> None:
    """Gives the files the names transformers expects, now that their number is known."""
    names = {
        f"model-{index:05d}.safetensors": f"model-{index:05d}-of-{count:05d}.safetensors"
        if count > 1
        else "model.safetensors"
        for index in range(1, count + 1)
    }
    for old, new in names.items():
        (out / old).rename(out / new)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[old] for key, old in sorted(weight_map.items())},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_configs(config: RunConfig, out: Path, *, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files, byte for byte."""
    eos = bos = None
    if config.data.tokenizer is not None:
        directory = Path(config.data.tokenizer)
        eos, bos = special_ids(directory)
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, out / name)
    else:
        log.warning("the run names no tokenizer (data.tokenizer): the export has none")
    _dump(out / "config.json", hf_config(config.model, eos_token_id=eos, bos_token_id=bos, dtype=dtype))
    _dump(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "max_new_tokens": 256})


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
