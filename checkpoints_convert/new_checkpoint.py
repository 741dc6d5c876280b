"""Writes a checkpoint of weights alone, as megatron-core would write it on one rank that saves no optimizer.

The same names, the same archives in the shards, the same metadata, so that any layout loads it. No process group and
no model is made, and no tensor is held whole.
"""

import io
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_convert import work
from checkpoints_convert.conversion import Converted, predict
from checkpoints_convert.encoding import Cast
from checkpoints_convert.output import OutputFile, OutputTensor, RowSpan, pack
from checkpoints_convert.progress import ByteProgress
from checkpoints_convert.release import identity_digest, sha256
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.manifest import FileEntry
from megatron_qwen.checkpoint.paths import LATEST, RUN_YAML, STATE, TOKENIZER, iteration_dir
from megatron_qwen.checkpoint.torch_file import Envelope, envelope
from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import Architecture, RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_qwen.data.tokenizers.tokenizer import copy_tokenizer
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.mapping import CoreTensor, TensorMapping, core_tensors
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)
NOTE = "conversion.json"
_CHECKPOINTS = "checkpoints"
_COMMON = "common_state/shard_0_1"
_SEQ_LENGTH = 4096  # for a run that starts from this checkpoint; that of Qwen2.5's first stage of pretraining


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint to write, of weights alone.

    Args:
        out: the directory to make.
        config: its run.yaml.
        files: its shards, named relative to ``out``.
        tokenizer: directory of the tokenizer that goes along; None for none.
        note: where it comes from, for conversion.json.
        identity: all that decides its bytes.
        table: what it holds of the model; None is all of it.
        state: what state.json has in addition.
    """

    out: Path
    config: RunConfig
    files: list[OutputFile]
    tokenizer: Path | None
    note: Mapping[str, Any]
    identity: dict[str, Any]
    table: Sequence[TensorMapping] | None = None
    state: Mapping[str, Any] = field(default_factory=dict)


def new_run(architecture: Architecture, out: Path, *, dtype: torch.dtype, tokenizer: bool) -> RunConfig:
    """The configuration to continue training from the checkpoint."""
    return RunConfig(
        recipe="custom",
        model=architecture.model,
        rope=architecture.rope,
        precision=PrecisionConfig(dtype="fp32" if dtype == torch.float32 else "bf16"),
        data=DataConfig(
            tokenizer=str(out.absolute() / TOKENIZER) if tokenizer else None,
            seq_length=min(_SEQ_LENGTH, architecture.model.max_position_embeddings),
        ),
        checkpoint=CheckpointConfig(load=str(out.absolute())),
    )


@cache
def _envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> Envelope:
    return envelope(dtype, shape)


def output_tensor(item: CoreTensor, dtype: torch.dtype, spans: Sequence[RowSpan]) -> OutputTensor:
    """A weight at one layer and expert as a slice in a shard; its name carries the index of the slice."""
    shape = (1,) * len(item.leading) + item.mapping.core_shape
    around = _envelope(dtype, shape)
    name = "/".join([item.mapping.core, *map(str, item.leading)])
    return OutputTensor(name, shape, dtype, tuple(spans), Cast(dtype), before=around.before, after=around.after)


def shards(outputs: Sequence[OutputTensor], *, limit: int) -> list[OutputFile]:
    """The shards of a checkpoint; megatron-core's own objects, which are empty, are in the last one."""
    groups = pack(outputs, [output.size for output in outputs], limit=limit)
    buffer = io.BytesIO()
    torch.save([{}], buffer)
    groups[-1].append(OutputTensor(_COMMON, (0,), torch.uint8, (), Cast(torch.uint8), before=buffer.getvalue()))
    folder = iteration_dir(Path(_CHECKPOINTS), 0)
    return [OutputFile(str(folder / f"__{number}_0.distcp"), b"", tuple(group)) for number, group in enumerate(groups)]


def write_checkpoint(checkpoint: NewCheckpoint, *, workers: int, restart: bool, quiet: bool) -> Converted:
    """Writes a new checkpoint with its run.yaml and tokenizer.

    Raises:
        ConversionError: its place is occupied, or its source cannot be read.
        DiskFullError: there is not enough room.
    """
    out, files = checkpoint.out, checkpoint.files
    total = sum(output.value_bytes for file in files for output in file.tensors)
    if _is_complete(out, checkpoint.identity):
        work.clear_notes(out)
        return Converted(out, total, total, 0.0, True, None)
    with work.begin(out, checkpoint.identity, restart=restart) as task:
        task.require_room(files)
        prediction = predict(task, files, out, new_digest=xxhash.xxh3_128, workers=workers)
        log.info("%s", prediction)
        progress = ByteProgress(total, quiet=quiet)
        try:
            written = task.write(files, new_digest=xxhash.xxh3_128, workers=workers, progress=progress)
        finally:
            progress.close()
        folder = iteration_dir(task.directory / _CHECKPOINTS, 0)
        _write_small_files(checkpoint, folder, task.directory)
        entries = {
            Path(name).name: FileEntry(done.size, done.digest, tuple(done.parts)) for name, done in written.items()
        }
        rest = [name for name in manifest.files_in(folder) if name not in entries]
        entries |= {name: manifest.hash_file(folder / name) for name in rest}
        manifest.write(folder, entries, iteration=0, attempt=0)
        task.commit()
    kept = sum(done.kept_bytes for done in written.values())
    return Converted(out, total, kept, progress.seconds, False, prediction)


def _write_small_files(checkpoint: NewCheckpoint, folder: Path, root: Path) -> None:
    text = to_yaml(checkpoint.config)
    (folder / RUN_YAML).write_text(text)
    (root / RUN_YAML).write_text(text)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").write_bytes(
        pickle.dumps(torch_metadata(checkpoint.files, checkpoint.config.model, checkpoint.table))
    )
    counters = ("iteration", "schedule_iteration", "consumed_samples", "consumed_tokens")
    state = {
        "progress": dict.fromkeys((*counters, "skipped_iterations", "consecutive_skips"), 0),
        "optimizer_step": 0,
        "world_size": 0,
        "layout": asdict(ParallelConfig()),
        "threads": 0,
        "backend": "none",
        "torch": torch.__version__,
        "code": code_version(),
        "converted_from": checkpoint.note,
        **checkpoint.state,
    }
    (folder / STATE).write_text(json.dumps(state, indent=2))
    (root / _CHECKPOINTS / LATEST).write_text(folder.name + "\n")
    if checkpoint.tokenizer is not None:
        copy_tokenizer(checkpoint.tokenizer, folder / TOKENIZER)
        copy_tokenizer(checkpoint.tokenizer, root / TOKENIZER)
    around = [root / RUN_YAML, root / _CHECKPOINTS / LATEST, *sorted((root / TOKENIZER).glob("*"))]
    note = {
        "format": 1,
        "identity": identity_digest(checkpoint.identity),
        "source": checkpoint.note,
        "files": {str(path.relative_to(root)): sha256(path) for path in around},
        "code": code_version(),
    }
    (root / NOTE).write_text(json.dumps(note, indent=1) + "\n")


def torch_metadata(
    files: Sequence[OutputFile], model: ModelConfig, table: Sequence[TensorMapping] | None = None
) -> Metadata:
    """torch's metadata of the shards: which slice of which tensor lies where."""
    by_name = {"/".join([item.mapping.core, *map(str, item.leading)]): item for item in core_tensors(model, table)}
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for output, start in zip(file.tensors, file.tensor_offsets(), strict=True):
            info = _StorageInfo(Path(file.name).name, start, output.size)
            item = by_name.get(output.name)
            if item is None:
                tensors[output.name] = BytesStorageMetadata()
                storage[MetadataIndex(output.name)] = info
                continue
            offsets = torch.Size(item.leading + (0,) * len(item.mapping.core_shape))
            entry = tensors.setdefault(item.mapping.core, _described(item, output, model))
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(output.shape)))
            storage[MetadataIndex(item.mapping.core, offsets)] = info
    return Metadata(state_dict_metadata=tensors, storage_data=storage)


def _described(item: CoreTensor, output: OutputTensor, model: ModelConfig) -> TensorStorageMetadata:
    leading = (model.num_layers, model.num_moe_experts or 0)[: len(item.leading)]
    size = torch.Size((*leading, *item.mapping.core_shape))
    return TensorStorageMetadata(TensorProperties(dtype=output.dtype), size, [])


def _is_complete(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a directory is the whole result of this very conversion; its files are read again."""
    try:
        noted = json.loads((out / NOTE).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(noted, dict) or noted.get("identity") != identity_digest(identity):
        return False
    damage = manifest.damage(iteration_dir(out / _CHECKPOINTS, 0))
    for name, digest in noted["files"].items():
        if not (out / name).is_file() or sha256(out / name) != digest:
            damage.append(Problem(str(out / name), None, "is missing, or its bytes have changed since it was written."))
    if damage:
        raise ConversionError(damage)
    return True
