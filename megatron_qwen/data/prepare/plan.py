"""How input files are divided into units and units into shards.

The division is a function of the input alone, not of the number of workers or tasks, so the output has the same bytes
however many of them make it, and an interrupted job resumes with another number.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.data.chat.options import ChatOptions
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.formats import Compression, FileFormat, InputFile
from megatron_qwen.data.text.inputs import LeftOut
from megatron_qwen.data.text.records import FileSpan
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, document_encoding
from megatron_qwen.errors import DataError, Problem

# Of input: the unit that a worker encodes and that a kill can lose, small enough that the last ones end at about the
# same time on all workers. Chosen by hand.
UNIT_BYTES = 16 << 20
_FORMAT = 2


@dataclass(frozen=True)
class Unit:
    """File spans that one process encodes into one part.

    Args:
        key: hash of everything that determines its tokens; another attempt, or another plan, finds the part by it.
        spans: what to read, in order.
    """

    key: str
    spans: tuple[FileSpan, ...]


@dataclass(frozen=True)
class OutputShard:
    """Units that become one token file.

    Args:
        prefix: of the token file.
        units: in the order of their tokens.
    """

    prefix: Path
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class PreparationPlan:
    """Everything that determines the bytes of the output.

    Args:
        prefix: of the output.
        tokenizer: its directory.
        documents: how documents become ids.
        files: the input, in order.
        left_out: what lies among the input and is not read, for the manifest.
        options: how records are read.
        skip_bad: write bad records to a file of their own and continue, instead of stopping.
        shards: the output; a single one has the output's own prefix.
        identity: what determines the output, as JSON; attempts with the same identity can continue each other.
        notes: what of the tokenizer's files is not used on documents, or may be meant otherwise; for people.
        chat: how conversations become ids; None where the records are texts.
    """

    prefix: Path
    tokenizer: Path
    documents: DocumentOptions
    files: tuple[InputFile, ...]
    left_out: tuple[LeftOut, ...]
    options: ReadOptions
    skip_bad: bool
    shards: tuple[OutputShard, ...]
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    chat: ChatOptions | None = None

    @property
    def has_mask(self) -> bool:
        """Whether its token files say which tokens carry loss."""
        return self.chat is not None or self.options.prompt_field is not None

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def work(self) -> Path:
        """Directory of parts until their shard is complete."""
        return self.prefix.with_name(self.prefix.name + ".work")


def make_plan(
    files: Sequence[InputFile],
    *,
    tokenizer: Path,
    prefix: Path,
    options: ReadOptions,
    documents: DocumentOptions | None = None,
    chat: ChatOptions | None = None,
    skip_bad: bool = False,
    left_out: Sequence[LeftOut] = (),
    shard_bytes: int | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> PreparationPlan:
    """Divides the input into units and shards.

    Args:
        files: the input, in order.
        tokenizer: its directory.
        prefix: of the output.
        options: how records are read.
        documents: how documents become ids.
        chat: how conversations become ids, if the records are conversations.
        skip_bad: write bad records to a file of their own and continue.
        left_out: what lies among the input and is not read.
        shard_bytes: input bytes on disk per shard; None makes one token file.
        unit_bytes: input bytes on disk per unit.

    Raises:
        DataError: a parquet file cannot be read or lacks a column; the tokenizer cannot be used.
    """
    stated = {**asdict(options), "where": [f"{one.field}{one.sign}{one.value}" for one in options.where]}
    if not options.pairs:
        del stated["pairs"]  # as earlier versions stated them
    if chat is None:
        del stated["chat"]  # as it was before there were conversations: what was prepared then is recognised
    documents = documents or DocumentOptions()
    encoding = document_encoding(tokenizer, documents)
    deciding = {
        "format": _FORMAT,
        "tokenizer_sha256": encoding.fingerprint,
        "end_of_text": encoding.end,  # the tokenizer's other files name it
        "control_tokens": "text" if documents.control_as_text else "tokens",
        "options": stated,
    }
    assert options.chat == (chat is not None)
    if chat is not None and (texts := [file.path for file in files if file.format is FileFormat.TXT]):
        fix = "is a text; conversations are JSON lines or Parquet."
        raise DataError([Problem(str(path), None, fix) for path in texts])
    if chat is not None:
        deciding["chat"] = chat.identity()
    unit_bytes = min(unit_bytes, shard_bytes or unit_bytes)
    units = tuple(Unit(_key(spans, deciding), spans) for spans in _units(files, options, unit_bytes))
    shards = _shards(units, prefix, shard_bytes)
    listed = hashlib.sha256("".join(unit.key for unit in units).encode())
    identity = {
        **deciding,
        "files": len(files),
        "units_sha256": listed.hexdigest(),
        "on_error": "skip" if skip_bad else "stop",
        "shard_bytes": shard_bytes,
    }
    return PreparationPlan(
        prefix,
        tokenizer,
        documents,
        tuple(files),
        tuple(left_out),
        options,
        skip_bad,
        shards,
        identity,
        tuple(encoding.notes),
        chat,
    )


def _key(spans: tuple[FileSpan, ...], deciding: dict[str, Any]) -> str:
    read = [
        (str(span.file.path.absolute()), span.file.size, span.file.path.stat().st_mtime_ns, span.start, span.stop)
        for span in spans
    ]
    return hashlib.sha256(json.dumps([read, deciding], sort_keys=True).encode()).hexdigest()[:24]


def _units(files: Sequence[InputFile], options: ReadOptions, unit_bytes: int) -> Iterator[tuple[FileSpan, ...]]:
    """Spans of each unit: a large file is divided into several units, small files share one."""
    gathered: list[FileSpan] = []
    size = 0
    for file in files:
        spans = list(_spans(file, options, unit_bytes))
        if len(spans) == 1 and size + file.size <= unit_bytes:
            gathered += spans
            size += file.size
            continue
        if gathered:
            yield tuple(gathered)
            gathered, size = [], 0
        if len(spans) == 1:
            gathered, size = spans, file.size
        else:
            yield from ((span,) for span in spans)
    if gathered:
        yield tuple(gathered)


def _spans(file: InputFile, options: ReadOptions, unit_bytes: int) -> Iterator[FileSpan]:
    if file.format is FileFormat.PARQUET:
        from megatron_qwen.data.text.parquet import row_groups

        first, size = 0, 0
        groups = row_groups(file, options)
        on_disk = file.size / max(sum(groups), 1)  # metadata gives the uncompressed size of a row group
        for index, group in enumerate(groups):
            if size and size + group > unit_bytes:
                yield FileSpan(file, first, index, round(size * on_disk))
                first, size = index, 0
            size += group
        yield FileSpan(file, first, len(groups), round(size * on_disk))
    elif file.format is FileFormat.JSONL and file.compression is Compression.PLAIN:
        for start in range(0, file.size, unit_bytes):
            stop = min(start + unit_bytes, file.size)
            yield FileSpan(file, start, stop, stop - start)
    else:
        yield FileSpan(file)


def _span_bytes(span: FileSpan) -> int:
    return span.file.size if span.size is None else span.size


def _shards(units: tuple[Unit, ...], prefix: Path, shard_bytes: int | None) -> tuple[OutputShard, ...]:
    if shard_bytes is None:
        return (OutputShard(prefix, units),)
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        more = sum(map(_span_bytes, unit.spans))
        if groups[-1] and size + more > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += more
    width = max(5, len(str(len(groups) - 1)))
    return tuple(
        OutputShard(prefix.with_name(f"{prefix.name}_{index:0{width}d}"), tuple(group))
        for index, group in enumerate(groups)
    )
