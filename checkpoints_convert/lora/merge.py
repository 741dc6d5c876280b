"""``mq convert merge``: a checkpoint of adapters and its base as one checkpoint of whole weights."""

from dataclasses import replace
from pathlib import Path

from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.conversion import DTYPES, Converted
from checkpoints_convert.new_checkpoint import NewCheckpoint, new_run, output_tensor, shards, write_checkpoint
from checkpoints_convert.output import RowSpan
from megatron_qwen.checkpoint.merged import MergedWeights
from megatron_qwen.checkpoint.paths import LORA_BASE
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.mapping import CoreTensor, core_tensors
from megatron_qwen.provenance import code_version


def merge(
    source: CheckpointSource,
    out: Path,
    *,
    dtype: str | None = None,
    workers: int = 2,
    restart: bool = False,
    quiet: bool = False,
) -> Converted:
    """Writes ``out``, which appears only when it is complete; resumes what an earlier attempt left.

    Args:
        source: a checkpoint of a run with LoRA.
        out: the directory to make.
        dtype: bf16, fp16 or fp32; None keeps that of the base.
        workers: shards written at a time.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.

    Raises:
        ConversionError: the checkpoint has no adapters, or ``out`` is occupied.
        DiskFullError: there is not enough room.
    """
    weights = source.weights
    if not isinstance(weights, MergedWeights):
        fix = "has no adapters: its weights are whole already."
        raise ConversionError(Problem(str(source.path), None, fix))
    items = list(core_tensors(source.config.model))
    formats = {item.mapping.core: DTYPES[dtype] if dtype else weights.dtype(item.mapping.core) for item in items}
    note = {
        "kind": "merged",
        "path": str(source.path.absolute()),
        "digest": source.digest(),
        "base": source.state[LORA_BASE],
    }
    identity = {"kind": "merge", "source": note, "out": str(out.absolute()), "dtype": dtype, "code": code_version()}
    first = next(iter(formats.values()))
    config = new_run(source.config.architecture, out, dtype=first, tokenizer=source.tokenizer is not None)
    # What it was trained for decides where a release says that answers end, and is on its card.
    config = replace(config, objective=replace(source.config.objective, token_descriptions={}))
    outputs = [output_tensor(item, formats[item.mapping.core], [_span(weights, item)]) for item in items]
    files = shards(outputs, limit=SHARD_BYTES)
    checkpoint = NewCheckpoint(out, config, files, source.tokenizer, note, identity)
    return write_checkpoint(checkpoint, workers=workers, restart=restart, quiet=quiet)


def _span(weights: MergedWeights, item: CoreTensor) -> RowSpan:
    return RowSpan(item.mapping.num_rows, lambda start, stop: weights.rows(item, start, stop))
