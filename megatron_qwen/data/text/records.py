"""Reads documents from files, a block at a time; every record is counted."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import orjson

from megatron_qwen.data.text.blocks import BadRecord, Block, Document, ReadOptions, as_text, take, take_chat
from megatron_qwen.data.text.filters import lookup
from megatron_qwen.data.text.formats import Compression, FileFormat, InputFile
from megatron_qwen.data.text.long import LONG_BYTES, LongText, take_apart
from megatron_qwen.data.text.unpack import unpacked
from megatron_qwen.errors import DataError, Problem

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SNIPPET = 60
_LONG_NUMBER = re.compile(rb"\d{19}")
_KEPT_BYTES = 1 << 16  # of a bad line, for the file of rejected records


@dataclass(frozen=True)
class FileSpan:
    """A part of a file that can be read on its own.

    Args:
        file: the file.
        start: first byte of a plain .jsonl, or first row group of a .parquet. A line belongs to the span it begins in.
        stop: end of the range; None is the end of the file.
        size: approximate bytes of the range on disk; None is the size of the file.
    """

    file: InputFile
    start: int = 0
    stop: int | None = None
    size: int | None = None


def read_span(span: FileSpan, options: ReadOptions, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Block]:
    """The documents of a span in the order of the file.

    Args:
        span: what to read.
        options: how documents are taken from records.
        on_read: called with bytes read from disk, for progress.

    Raises:
        DataError: the file cannot be read, or is damaged as a whole.
    """
    try:
        if span.file.format is FileFormat.TXT:
            yield from _whole_text(span.file, options, on_read)
        elif span.file.format is FileFormat.PARQUET:
            from megatron_qwen.data.text.parquet import parquet_blocks

            yield from parquet_blocks(span.file, span.start, span.stop, options, on_read)
        else:
            yield from _json_blocks(span, options, on_read)
    except OSError as error:
        raise DataError(Problem(str(span.file.path), None, f"cannot be read ({error.strerror}).")) from None


def documents(files: Sequence[InputFile], options: ReadOptions) -> Iterator[str]:
    """All documents of files; the first bad record is an error.

    Raises:
        DataError: a record is bad, or a file is damaged.
    """
    for file in files:
        for block in read_span(FileSpan(file), options):
            if block.bad:
                raise DataError([bad.problem() for bad in block.bad[:10]])
            yield from map(as_text, block.texts)


def _whole_text(file: InputFile, options: ReadOptions, on_read: Callable[[int], None]) -> Iterator[Block]:
    content = bytearray()
    for piece in unpacked(file, on_read):
        content += piece
        if len(content) > options.max_document_bytes:
            yield Block(read=1, bad=[BadRecord(str(file.path), None, _too_long(options))], bytes=len(content))
            return
    size = len(content)
    if size > LONG_BYTES and options.separator is None:
        yield _long_text(content, file)
        return
    try:
        text = (content[3:] if content.startswith(_BOM) else content).decode()
    except UnicodeDecodeError as error:
        bad = BadRecord(str(file.path), f"byte {error.start}", "is not UTF-8 text; convert the file.")
        yield Block(read=1, bad=[bad], bytes=size)
        return
    del content
    texts = [text] if options.separator is None else text.split(options.separator)
    full: list[Document] = [one for one in texts if one.strip()]
    yield Block(texts=full, read=len(texts), empty=len(texts) - len(full), bytes=size)


def _long_text(content: bytearray, file: InputFile) -> Block:
    text = LongText(memoryview(content)[3 if content.startswith(_BOM) else 0 :], escaped=False)
    try:
        text.check()
    except ValueError:
        bad = BadRecord(str(file.path), None, "is not UTF-8 text; convert the file.")
        return Block(read=1, bad=[bad], bytes=len(content))
    return Block(texts=[text], read=1, bytes=len(content))


def _json_blocks(span: FileSpan, options: ReadOptions, on_read: Callable[[int], None]) -> Iterator[Block]:
    number = _LineNumbers(span)
    for lines in _lines(span, options, on_read):
        passed = len(lines)
        block = _parse(lines, options, number)
        lines.clear()  # a line may be large, and its document is a copy
        yield block
        number.passed += passed


class _LineNumbers:
    """Line numbers in the file for lines of a span. Lines before the span are counted only when a message needs one."""

    def __init__(self, span: FileSpan) -> None:
        self.span, self.passed = span, 0
        self._before: int | None = None if span.start else 0

    def __getitem__(self, index: int) -> str:
        if self._before is None:
            self._before = 0
            left = self.span.start
            with self.span.file.path.open("rb") as file:
                while left and (piece := file.read(min(left, 1 << 24))):
                    self._before += piece.count(b"\n")
                    left -= len(piece)
            with self.span.file.path.open("rb") as file:
                file.seek(self.span.start - 1)
                self._before += file.read(1) != b"\n"  # a line that crosses the start belongs to the span before
        return f"{self.span.file.path}:{self._before + self.passed + index + 1}"


def _lines(
    span: FileSpan, options: ReadOptions, on_read: Callable[[int], None]
) -> Iterator[list[bytes | bytearray | None]]:
    """Complete lines, some at a time; None in place of a line that is too long."""
    pieces = unpacked(span.file, on_read) if span.file.compression is not Compression.PLAIN else _range(span, on_read)
    held = bytearray()
    too_long, first = False, span.start == 0
    for piece in pieces:
        if first and piece.startswith(_BOM):
            piece = piece[3:]
        first = False
        end = piece.rfind(b"\n")
        if end < 0:
            if not too_long:
                held += piece
            if len(held) > options.max_document_bytes:
                held, too_long = bytearray(), True
            continue
        if too_long:
            begin = piece.find(b"\n") + 1
            yield [None, *piece[begin:end].split(b"\n")] if begin <= end else [None]
            too_long = False
        else:
            begin = piece.find(b"\n")
            held += piece[:begin]
            lines: list[bytes | bytearray | None] = [held]
            held = bytearray()
            yield lines
            if begin < end:
                yield list(piece[begin + 1 : end].split(b"\n"))
        held = bytearray(piece[end + 1 :])
    if too_long:
        yield [None]
    elif held:
        lines = [held]
        held = bytearray()
        yield lines


def _range(span: FileSpan, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of the lines that begin in a span of a plain file."""
    stop = span.file.size if span.stop is None else span.stop
    with span.file.path.open("rb") as file:
        left = stop - span.start
        if span.start:
            file.seek(span.start - 1)
            skipped = _skip_line(file, left + 1) - 1
            on_read(min(max(skipped, 0), left))
            left -= skipped
        if left <= 0:
            return
        last = b"\n"
        while left > 0 and (last := file.read(min(left, _BLOCK_BYTES))):
            left -= len(last)
            on_read(len(last))
            yield last
        while last and not last.endswith(b"\n"):  # the last line continues after the span
            last = file.readline(_BLOCK_BYTES)
            if last:
                yield last


def _skip_line(file: BinaryIO, limit: int) -> int:
    """Reads to the end of the line, or until ``limit`` bytes; returns how many."""
    read = 0
    while read < limit and (piece := file.readline(min(_BLOCK_BYTES, limit - read))):
        read += len(piece)
        if piece.endswith(b"\n"):
            return read
    return max(read, limit)


def _parse(lines: list[bytes | bytearray | None], options: ReadOptions, number: _LineNumbers) -> Block:
    block = Block()
    name, plain = options.field, options.prompt_field is None and not options.where
    texts, loads = block.texts, _loads_exactly if options.chat else orjson.loads
    for index, line in enumerate(lines):
        if line is None:
            block.read += 1
            block.bad.append(BadRecord(number[index], None, _too_long(options), reason="too large"))
            continue
        block.bytes += len(line) + 1
        if len(line) > LONG_BYTES and not options.chat:
            _take_long(block, bytearray(line) if isinstance(line, bytes) else line, options, number[index])
            continue
        try:
            record = loads(line)
        except orjson.JSONDecodeError:
            if not line.strip():
                continue
            if (record := _with_extensions(line, options)) is None:
                block.read += 1
                block.bad.append(_bad_line(number, index, line, _why_no_json(line), "no JSON"))
                continue
        block.read += 1
        if options.chat:
            take_chat(block, record, options, partial(_bad_line, number, index, line))
            continue
        text = record.get(name) if isinstance(record, dict) else None
        if plain and type(text) is str and text:
            texts.append(text)
            continue
        if text is None:
            text = lookup(record, name, None)
        if (fix := take(block, record, text, options)) is not None:
            block.bad.append(BadRecord(number[index], _snippet(line), fix, _raw(line)))
    return block


def _loads_exactly(line: bytes | bytearray) -> Any:
    """JSON with whole numbers of any size: orjson gives those of more than 64 bits as floating-point ones."""
    record = orjson.loads(line)
    # Numbers that are trained on stand in calls and schemas of tools alone.
    has_tools = b"tool" in line or b"function" in line
    return json.loads(bytes(line).decode()) if has_tools and _LONG_NUMBER.search(line) else record


def _bad_line(number: _LineNumbers, index: int, line: bytes | bytearray, fix: str, reason: str) -> BadRecord:
    return BadRecord(number[index], _snippet(line), fix, _raw(line), reason)


def _take_long(block: Block, line: bytearray, options: ReadOptions, where: str) -> None:
    """Takes the document of a long line without converting the whole line into one string."""
    block.read += 1
    short, long_strings = take_apart(line)
    try:
        try:
            record = orjson.loads(short)
        except orjson.JSONDecodeError:
            if (record := _with_extensions(short, options)) is None:
                raise
        text = lookup(record, options.field, None)
        text = long_strings.get(text, text) if isinstance(text, str) else text
        if isinstance(text, LongText):
            text.check()
    except (ValueError, RecursionError):
        block.bad.append(BadRecord(where, _snippet(line), "is not JSON, or not UTF-8 text.", _raw(line)))
        return
    if (fix := take(block, record, text, options)) is not None:
        block.bad.append(BadRecord(where, _snippet(line), fix, _raw(line)))


def _snippet(line: bytes | bytearray) -> str:
    return bytes(line[: 4 * _SNIPPET]).decode(errors="replace")[:_SNIPPET].strip()


def _raw(line: bytes | bytearray) -> bytes:
    return bytes(line[:_KEPT_BYTES])


def _with_extensions(line: bytes | bytearray, options: ReadOptions) -> Any:
    """A record with what Python's writer allows and JSON does not (NaN, half a surrogate pair) in fields that are not
    read; None otherwise.
    """
    if options.chat:
        return None  # all of a conversation is read
    try:
        record = json.loads(bytes(line).decode())  # of bytes it would guess the encoding
        for name in filter(None, (options.field, options.prompt_field)):
            str(lookup(record, name)).encode()
    except (ValueError, RecursionError):
        return None
    return record


def _why_no_json(line: bytes | bytearray) -> str:
    try:
        bytes(line).decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text (byte {error.start} of the line); convert the file."
    if b"\0" in line:
        return "contains a NUL byte: the file is damaged, or not text."
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({str(error)[:100]})."
    if b"\\u" in line:
        return "contains half a surrogate pair, which is not a character; fix or remove the line."
    return "is not JSON."


def _too_long(options: ReadOptions) -> str:
    return f"is longer than {options.max_document_bytes >> 20} MiB; split it, or raise --max-document-mib."
