"""``mq convert from-peft``: an adapter of PEFT as a checkpoint of adapters, to train on, generate with, or merge."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.conversion import Converted
from checkpoints_convert.hf_directory import many, read_json
from checkpoints_convert.lora.peft_config import CONFIG, WEIGHTS, lora_of
from checkpoints_convert.new_checkpoint import NewCheckpoint, new_run, output_tensor, shards, write_checkpoint
from checkpoints_convert.output import RowSpan
from checkpoints_convert.release import sha256
from checkpoints_convert.tensor_set import ExportedWeights
from megatron_qwen.checkpoint.lora_base import identified
from megatron_qwen.checkpoint.merged import MergedWeights
from megatron_qwen.checkpoint.paths import LORA_BASE
from megatron_qwen.config.lora import EMBEDDING, HEAD, LoraConfig, possible_targets
from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.adapters import PREFIX, adapter_mappings, turned_in_peft
from megatron_qwen.hf.mapping import CoreTensor, core_tensors
from megatron_qwen.provenance import code_version

_KEY = re.compile(re.escape(PREFIX) + r"(?:model\.)?(?:layers\.\d+\.)?(.+)\.lora_(?:embedding_)?[AB]\b")
log = logging.getLogger(__name__)
_COPY = (f"{EMBEDDING}.base_layer.weight", f"{HEAD}.base_layer.weight")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's directory.

    Args:
        path: the directory.
        lora: its adapters in a run's words.
        tensors: all of its weights, by their names there.
        copies: weights of the base that PEFT has put in: it does so where a vocabulary matrix has an adapter.
    """

    path: Path
    lora: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]


def read_adapter(path: Path, model: ModelConfig) -> PeftAdapter:
    """Reads a directory of PEFT.

    Args:
        path: the directory.
        model: what the adapter is for.

    Raises:
        ConversionError: it is damaged, is for another model, or asks for what a run cannot have.
    """
    problems: list[Problem] = []
    content = read_json(path / CONFIG, problems)
    if not (path / WEIGHTS).is_file():
        other = (path / "adapter_model.bin").is_file()
        fix = "is missing; adapter_model.bin is a pickle: save the adapter as safetensors." if other else "is missing."
        problems.append(Problem(str(path / WEIGHTS), None, fix))
    if problems or content is None:
        raise ConversionError(problems)
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            tensors = {name: _turned(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(Problem(str(path / WEIGHTS), None, f"cannot be read: {error}.")) from None
    copies = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_COPY)}
    found = {_EXPERT.sub(".experts.", match.group(1)) for name in tensors if (match := _KEY.match(name))}
    known = [target.name for target in possible_targets(model)]
    lora = lora_of(content, tuple(name for name in known if name in found), path / CONFIG, model)
    if problems := _misfits(path, lora, model, tensors):
        raise ConversionError(problems)
    return PeftAdapter(path, lora, tensors, copies)


def _turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t() if turned_in_peft(name) and tensor.dim() == 2 else tensor


def _misfits(path: Path, lora: LoraConfig, model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    """What a run with these adapters would have and the file lacks, or the other way round."""
    expected = {item.names[0]: item.mapping.core_shape for item in _items(lora, model)} if lora.target_modules else {}
    where = path / WEIGHTS
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(many(where, missing, "adapters are missing: every layer (and expert) of a kind has one"))
    if extra := [name for name in tensors if name not in expected]:
        problems.append(many(where, extra, "tensors are no adapter that this model can have"))
    problems += [
        Problem(f"{where}: {name}", str(tuple(tensors[name].shape)), f"must have the shape {shape}.")
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    formats = {tensor.dtype for tensor in tensors.values()}
    if len(formats) > 1 or not formats <= {torch.float32, torch.bfloat16, torch.float16}:
        told = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in formats))
        problems.append(Problem(str(where), told, "all tensors must have one format: float32, bfloat16 or float16."))
    return problems


def _items(lora: LoraConfig, model: ModelConfig) -> Iterable[CoreTensor]:
    return core_tensors(model, adapter_mappings(lora, model))


def from_peft(
    path: Path, base: CheckpointSource, out: Path, *, workers: int = 2, restart: bool = False, quiet: bool = False
) -> Converted:
    """Writes a checkpoint of adapters.

    Args:
        path: directory of PEFT.
        base: the checkpoint of the weights that the adapter is for.
        out: the directory to make.
        workers: shards written at a time.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.

    Raises:
        ConversionError: the adapter cannot be converted, with everything that is wrong; or ``out`` is occupied.
        DiskFullError: there is not enough room.
    """
    if isinstance(base.weights, MergedWeights) or base.entries is None:
        what = "has adapters itself: merge them first (mq convert merge)"
        fix = what if base.entries is not None else "has no manifest; convert it first (mq convert to-hf, from-hf)"
        raise ConversionError(Problem("--base", base.path, f"{fix}."))
    model = base.config.model
    adapter = read_adapter(path, model)
    if problems := list(_other_copies(adapter, base)):
        raise ConversionError(problems)
    dtype = next(iter(adapter.tensors.values())).dtype
    noted = identified(base.path).as_json()
    tokenizer = path if (path / "tokenizer.json").is_file() else base.tokenizer
    if base.config.objective.kind == "pretrain":
        log.warning("%s: whether it was trained to answer is not noted there: an export ends as its base does", path)
    hashes = {name: sha256(path / name) for name in (CONFIG, WEIGHTS, "tokenizer.json") if (path / name).is_file()}
    note: dict[str, Any] = {"kind": "peft", "path": str(path.absolute()), "files": hashes}
    identity = {"kind": "from-peft", "source": note, "base": noted, "out": str(out.absolute()), "code": code_version()}
    config = new_run(
        base.config.architecture, out, dtype=base.weights.dtype(_any_core(model)), tokenizer=tokenizer is not None
    )
    outputs = [
        output_tensor(item, dtype, [_span(adapter.tensors[item.names[0]])]) for item in _items(adapter.lora, model)
    ]
    checkpoint = NewCheckpoint(
        out,
        replace(config, lora=adapter.lora, objective=ObjectiveConfig(kind=base.config.objective.kind)),
        shards(outputs, limit=SHARD_BYTES),
        tokenizer,
        note,
        identity,
        table=adapter_mappings(adapter.lora, model),
        state={LORA_BASE: noted},
    )
    return write_checkpoint(checkpoint, workers=workers, restart=restart, quiet=quiet)


def _other_copies(adapter: PeftAdapter, base: CheckpointSource) -> Iterator[Problem]:
    """Copies of the base's weights that are not those of the base."""
    weights = ExportedWeights(base.weights)
    for name, copy in adapter.copies.items():
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        info = weights.tensors.get(own)
        if (
            info is None
            or tuple(copy.shape) != info.shape
            or not torch.equal(copy, weights.rows(own, 0, info.shape[0]).to(copy.dtype))
        ):
            fix = f"is not the weight of {base.path}: the adapter is for another base, or was trained with more tokens."
            yield Problem(f"{adapter.path / WEIGHTS}: {name}", None, fix)


def _any_core(model: ModelConfig) -> str:
    return next(core_tensors(model)).mapping.core


def _span(tensor: torch.Tensor) -> RowSpan:
    return RowSpan(len(tensor), lambda start, stop: tensor[start:stop])
