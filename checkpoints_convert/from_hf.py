"""``mq convert from-hf``: a Hugging Face directory as a checkpoint that any layout loads."""

import logging
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.conversion import DTYPES, Converted
from checkpoints_convert.hf_directory import HfDirectory
from checkpoints_convert.new_checkpoint import NewCheckpoint, new_run, output_tensor, shards, write_checkpoint
from checkpoints_convert.output import RowSpan
from checkpoints_convert.release import sha256
from megatron_qwen.hf.kept import keys_with_effect
from megatron_qwen.hf.mapping import core_tensors
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportOptions:
    """How to import.

    Args:
        dtype: bf16, fp16 or fp32; None keeps what the directory holds.
        max_shard_bytes: size at which a new shard is begun; None is 5 GB.
        workers: shards written at a time.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.
    """

    dtype: str | None = None
    max_shard_bytes: int | None = None
    workers: int = 2
    restart: bool = False
    quiet: bool = False


def convert(hf_dir: Path, out: Path, options: ImportOptions) -> Converted:
    """Writes ``out``, which appears only when it is complete; resumes what an earlier attempt left.

    Raises:
        ConversionError: the directory cannot be converted, with everything that is wrong; or ``out`` is occupied.
        DiskFullError: there is not enough room.
    """
    source = HfDirectory(hf_dir, mixed=options.dtype is not None)
    for one in source.passed_over:
        log.warning("%s: not converted: %s", hf_dir, one)
    for one in source.read_as:
        log.warning("%s: %s", hf_dir, one)
    if effects := keys_with_effect(source.config or {}):
        fix = "is not computed here. An export keeps it"
        log.warning("%s: %s: %s", hf_dir / "config.json", ", ".join(effects), fix)
    formats = {info.dtype for info in source.tensors.values()}
    dtype = DTYPES[options.dtype] if options.dtype else formats.pop()
    names = source.tokenizer_files()
    has_tokenizer = any(name in names for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if not has_tokenizer:
        log.warning("%s holds no tokenizer: the checkpoint has none", hf_dir)
    note = {
        "kind": "huggingface",
        "path": str(hf_dir.absolute()),
        "digest": source.digest(),
        "config.json": source.config,
        "generation_config.json": source.generation,
        # Converted back, every tensor goes to the file it came from.
        "files": source.files(),
    }
    identity = {
        "kind": "from-hf",
        "source": note,
        "out": str(out.absolute()),
        "dtype": str(dtype),
        "max_shard_bytes": options.max_shard_bytes,
        "tokenizer": {name: sha256(hf_dir / name) for name in names},
        "code": code_version(),
    }
    config = new_run(source.architecture, out, dtype=dtype, tokenizer=has_tokenizer)
    outputs = [
        output_tensor(item, dtype, [_piece(source, item.names[part], *span) for part, span in item.mapping.origin()])
        for item in core_tensors(source.shape)
    ]
    files = shards(outputs, limit=options.max_shard_bytes or SHARD_BYTES)
    checkpoint = NewCheckpoint(out, config, files, hf_dir if has_tokenizer else None, note, identity)
    return write_checkpoint(checkpoint, workers=options.workers, restart=options.restart, quiet=options.quiet)


def _piece(source: HfDirectory, name: str, first: int, last: int) -> RowSpan:
    return RowSpan(last - first, lambda start, stop: source.rows(name, first + start, first + stop))
