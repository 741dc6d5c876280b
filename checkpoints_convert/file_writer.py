"""Writes one file of tensors, and resumes what an earlier attempt left of it.

A journal notes after every block how far a tensor is and the hash of its bytes so far. Another attempt reads the file
back, keeps what has these hashes, and writes on behind it. So a kill costs the blocks that were being written.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import torch
import xxhash

from checkpoints_convert.output import OutputFile, OutputTensor, RowSpan, cast
from checkpoints_convert.progress import ByteProgress
from megatron_qwen.files import sync_stream

LARGEST_BLOCK, _SMALLEST_BLOCK = 1 << 23, 1 << 16
# Blocks of as many workers as there may be are together smaller than a file.
_BLOCKS_OF_A_FILE = 8


class Digest(Protocol):
    """A running hash."""

    def update(self, data: Any, /) -> None:
        """Takes bytes."""

    def copy(self) -> Any:
        """The same state, apart."""

    def hexdigest(self) -> str:
        """The hash so far."""


class Stopped(Exception):
    """Another file failed; this one stays as far as it is."""


@dataclass
class Written:
    """A file that is there, whole.

    Args:
        size: its bytes.
        digest: hash of the file.
        tensors: xxh3-128 of the values of each tensor.
        parts: bytes and xxh3-128 of the header and of each record, in order.
        kept_bytes: of the values, those that an earlier attempt had written.
    """

    size: int = 0
    digest: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[int, str]] = field(default_factory=list)
    kept_bytes: int = 0


@dataclass(frozen=True)
class _Block:
    """Rows of one piece, written at once."""

    piece: RowSpan
    start: int
    stop: int


@dataclass
class _Half:
    """A record that is begun: its hashes so far, and how many of its blocks are there."""

    values: Any = field(default_factory=xxhash.xxh3_128)
    whole: Any = field(default_factory=xxhash.xxh3_128)
    blocks: int = 0


def block_bytes(files: Sequence[OutputFile]) -> int:
    """Bytes read and written at once; the same whenever the same files are written."""
    largest = max(file.size for file in files)
    return max(_SMALLEST_BLOCK, min(LARGEST_BLOCK, largest // _BLOCKS_OF_A_FILE))


class FileWriter:
    """Writes a file.

    Args:
        file: what to write.
        path: where.
        journal: where it is noted how far it is.
        new_digest: begins the hash of the file.
        block: bytes read and written at once.
        progress: told of every byte.
        stop: set where another file failed.
    """

    def __init__(
        self,
        file: OutputFile,
        path: Path,
        journal: Path,
        *,
        new_digest: Callable[[], Digest],
        block: int,
        progress: ByteProgress,
        stop: threading.Event,
    ) -> None:
        self._file, self._path, self._journal = file, path, journal
        self._new_digest, self._block, self._progress, self._stop = new_digest, block, progress, stop
        self._digest = new_digest()
        self._done = Written(size=file.size)

    def write(self) -> Written:
        """Writes what is missing.

        Raises:
            OSError: what is written so far stays, and is noted.
            Stopped: another file failed.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        there = self._path.is_file()
        noted = _read_journal(self._journal) if there else {}
        with self._path.open("r+b" if there else "w+b", buffering=0) as stream:
            complete, half = self._keep(stream, noted)
            stream.truncate(stream.tell())
            with self._journal.open("w") as journal:
                # What is kept is noted again, so that a journal never promises more than the file holds.
                for number, whole in enumerate(complete):
                    _note(journal, number, len(self._blocks(self._file.records[number])), whole)
                if half.blocks:
                    _note(journal, len(complete), half.blocks, half.whole.hexdigest())
                for number in range(len(complete), len(self._file.records)):
                    self._record(number, stream, journal, half)
                    half = _Half()
            sync_stream(stream)
        self._done.digest = self._digest.hexdigest()
        return self._done

    def _record(self, number: int, stream: BinaryIO, journal: TextIO, half: _Half) -> None:
        """Writes a tensor from the block on at which ``half`` stands."""
        record = self._file.records[number]

        def put(data: Any) -> None:
            self._digest.update(data)
            half.whole.update(data)
            _write(stream, data)

        if not half.blocks:
            put(record.before)
        blocks = self._blocks(record)
        for block in blocks[half.blocks :]:
            self._check()
            rows = cast(block.piece.read(block.start, block.stop), record)
            data = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())
            half.values.update(data)
            put(data)
            half.blocks += 1
            if half.blocks < len(blocks):
                _note(journal, number, half.blocks, half.whole.hexdigest())
            self._progress.add(len(data))
        put(record.after)
        self._finish(record, half)
        _note(journal, number, len(blocks), half.whole.hexdigest())

    def _finish(self, record: OutputTensor, half: _Half) -> None:
        self._done.tensors[record.name] = half.values.hexdigest()
        self._done.parts.append((record.size, half.whole.hexdigest()))

    def _keep(self, stream: BinaryIO, noted: dict[int, tuple[int, str]]) -> tuple[list[str], _Half]:
        """Reads back what is there; leaves the stream behind the last block that is as noted.

        Returns:
            The hash of every complete record, and the state of the one that is begun.
        """
        header = self._file.header
        if not noted or stream.read(len(header)) != header:
            stream.seek(0)
            _write(stream, header)
        self._digest.update(header)
        if header:
            self._done.parts.append((len(header), xxhash.xxh3_128_hexdigest(header)))
        complete: list[str] = []
        for number, record in enumerate(self._file.records):
            begin, digest = stream.tell(), self._digest.copy()
            blocks = self._blocks(record)
            half = self._half_of(record, stream, noted.get(number), len(blocks))
            if half is None:
                stream.seek(begin)
                self._digest = digest
                break
            kept = self._bytes(record, half.blocks)
            self._done.kept_bytes += kept
            self._progress.add(kept)
            if half.blocks < len(blocks):
                return complete, half
            self._finish(record, half)
            complete.append(half.whole.hexdigest())
        return complete, _Half()

    def _half_of(
        self, record: OutputTensor, stream: BinaryIO, noted: tuple[int, str] | None, blocks: int
    ) -> _Half | None:
        """The state of a record after the blocks that are noted, or None where they are not there."""
        if noted is None or noted[0] > blocks or (noted[0] == 0 and blocks):
            return None
        half = _Half(blocks=noted[0])
        lengths = [(len(record.before), False), (self._bytes(record, noted[0]), True)]
        if noted[0] == blocks:
            lengths.append((len(record.after), False))
        for length, is_values in lengths:
            while length:
                self._check()
                data = stream.read(min(length, LARGEST_BLOCK))
                if not data:
                    return None
                self._digest.update(data)
                half.whole.update(data)
                if is_values:
                    half.values.update(data)
                length -= len(data)
        return half if half.whole.hexdigest() == noted[1] else None

    def _blocks(self, record: OutputTensor) -> list[_Block]:
        blocks = []
        for piece in record.pieces:
            rows = max(1, self._block // max(1, record.row_bytes, piece.row_bytes))
            blocks += [_Block(piece, start, min(piece.rows, start + rows)) for start in range(0, piece.rows, rows)]
        return blocks

    def _bytes(self, record: OutputTensor, blocks: int) -> int:
        """Bytes of the values in the first blocks of a record."""
        return sum(block.stop - block.start for block in self._blocks(record)[:blocks]) * record.row_bytes

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _note(journal: TextIO, number: int, blocks: int, whole: str) -> None:
    line = f"{number} {blocks} {whole}"
    journal.write(f"{line} {xxhash.xxh3_64_hexdigest(line.encode())}\n")
    journal.flush()


def _read_journal(path: Path) -> dict[int, tuple[int, str]]:
    """By record, the blocks that are noted and the hash up to there; a line that was cut off says nothing."""
    noted: dict[int, tuple[int, str]] = {}
    for line in _lines(path):
        text, _, check = line.rpartition(" ")
        words = text.split(" ")
        if len(words) == 3 and check == xxhash.xxh3_64_hexdigest(text.encode()):
            noted[int(words[0])] = int(words[1]), words[2]
    return noted


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(errors="replace").splitlines()


def _write(stream: BinaryIO, data: Any) -> None:
    view = memoryview(data)
    while len(view):
        view = view[stream.write(view) :]
