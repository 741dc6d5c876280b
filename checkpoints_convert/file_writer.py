"""Writes one file of tensors, and resumes what an earlier attempt left of it.

A journal records after every block how far a tensor is and the hash of its bytes so far. The next attempt reads the
file back, keeps what has these hashes, and continues after it. So a kill costs only the blocks that were being written.

The journal is not synced: its hashes are compared with the bytes of the file, so a line that outlived its bytes after a
power loss is found out and the block is written again.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import torch
import xxhash

from checkpoints_convert.output import OutputFile, OutputTensor
from checkpoints_convert.progress import ByteProgress
from megatron_qwen.files import sync_stream

LARGEST_BLOCK, _SMALLEST_BLOCK = 1 << 23, 1 << 16
# A block is at most an eighth of the largest file, so that the blocks of several workers together stay smaller than it.
_BLOCKS_OF_A_FILE = 8


class Digest(Protocol):
    """A running hash."""

    def update(self, data: Any, /) -> None:
        """Takes bytes."""

    def copy(self) -> Any:
        """An independent copy of the state."""

    def hexdigest(self) -> str:
        """The hash so far."""


class Stopped(Exception):
    """Another file failed; this one is left as it is, to be resumed."""


@dataclass
class Written:
    """A complete file.

    Args:
        size: its bytes.
        digest: hash of the file.
        tensors: xxh3-128 of the values of each tensor.
        parts: bytes and xxh3-128 of the header and of each tensor, in order.
        kept_bytes: of the values, those that an earlier attempt had written.
    """

    size: int = 0
    digest: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[int, str]] = field(default_factory=list)
    kept_bytes: int = 0


@dataclass(frozen=True)
class _Noted:
    """What the journal says of a tensor: its blocks in the file, the bytes of their values, the hash up to there."""

    blocks: int
    value_bytes: int
    whole: str


@dataclass
class _Unfinished:
    """A tensor that is partly written: its hashes so far, its blocks in the file and the bytes of their values."""

    values: Any = field(default_factory=xxhash.xxh3_128)
    whole: Any = field(default_factory=xxhash.xxh3_128)
    blocks: int = 0
    value_bytes: int = 0

    def noted(self) -> _Noted:
        """What the journal is to say of it."""
        return _Noted(self.blocks, self.value_bytes, self.whole.hexdigest())


def block_bytes(files: Sequence[OutputFile]) -> int:
    """Bytes read and written at once; the same whenever the same files are written."""
    largest = max(file.size for file in files)
    return max(_SMALLEST_BLOCK, min(LARGEST_BLOCK, largest // _BLOCKS_OF_A_FILE))


class FileWriter:
    """Writes a file.

    Args:
        file: what to write.
        path: where.
        journal: file that records the progress.
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
            OSError: what is written so far stays and is in the journal.
            Stopped: another file failed.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        there = self._path.is_file()
        noted = _read_journal(self._journal) if there else {}
        with self._path.open("r+b" if there else "w+b", buffering=0) as stream:
            complete, begun = self._keep(stream, noted)
            stream.truncate(stream.tell())
            with self._journal.open("w") as journal:
                # The journal is rewritten for what is kept: an old line about bytes that were just truncated must not
                # survive.
                for number, kept in enumerate(complete):
                    _note(journal, number, kept)
                if begun.blocks:
                    _note(journal, len(complete), begun.noted())
                for number in range(len(complete), len(self._file.tensors)):
                    self._write_tensor(number, stream, journal, begun)
                    begun = _Unfinished()
            sync_stream(stream)
        self._done.digest = self._digest.hexdigest()
        return self._done

    def _write_tensor(self, number: int, stream: BinaryIO, journal: TextIO, begun: _Unfinished) -> None:
        """Writes a tensor, from the first block that ``begun`` does not have."""
        output = self._file.tensors[number]

        def put(data: Any) -> None:
            self._digest.update(data)
            begun.whole.update(data)
            _write(stream, data)

        if not begun.blocks:
            put(output.before)
        blocks = output.blocks(self._block)
        for start, stop in blocks[begun.blocks :]:
            self._check()
            data = memoryview(output.values(start, stop).contiguous().view(-1).view(torch.uint8).numpy())
            begun.values.update(data)
            put(data)
            begun.blocks += 1
            begun.value_bytes += len(data)
            # The last block is recorded below, after the bytes of the file format that follow the values.
            if begun.blocks < len(blocks):
                _note(journal, number, begun.noted())
            self._progress.add(len(data))
        # The header has the size already: an encoding that makes other bytes than it announced is a defect.
        assert begun.value_bytes == output.value_bytes, f"{output.name}: {begun.value_bytes} of {output.value_bytes}"
        put(output.after)
        self._finish(output, begun)
        _note(journal, number, begun.noted())

    def _finish(self, output: OutputTensor, begun: _Unfinished) -> None:
        self._done.tensors[output.name] = begun.values.hexdigest()
        self._done.parts.append((output.size, begun.whole.hexdigest()))

    def _keep(self, stream: BinaryIO, noted: dict[int, _Noted]) -> tuple[list[_Noted], _Unfinished]:
        """Reads the file back; leaves the stream after the last block that matches the journal.

        Returns:
            What the journal says of every complete tensor, and the state of the one that is begun.
        """
        header = self._file.header
        if not noted or stream.read(len(header)) != header:
            stream.seek(0)
            _write(stream, header)
        self._digest.update(header)
        if header:
            self._done.parts.append((len(header), xxhash.xxh3_128_hexdigest(header)))
        complete: list[_Noted] = []
        for number, output in enumerate(self._file.tensors):
            begin, digest = stream.tell(), self._digest.copy()
            blocks = len(output.blocks(self._block))
            begun = self._begun_of(output, stream, noted.get(number), blocks)
            if begun is None:
                # The bytes of this tensor do not match: go back to its start, also in the hash of the file.
                stream.seek(begin)
                self._digest = digest
                break
            self._done.kept_bytes += begun.value_bytes
            self._progress.add(begun.value_bytes)
            if begun.blocks < blocks:
                return complete, begun
            self._finish(output, begun)
            complete.append(begun.noted())
        return complete, _Unfinished()

    def _begun_of(
        self, output: OutputTensor, stream: BinaryIO, noted: _Noted | None, blocks: int
    ) -> _Unfinished | None:
        """The state of a tensor after its recorded blocks, or None if the file does not have them."""
        if noted is None or noted.blocks > blocks or (noted.blocks == 0 and blocks):
            return None
        begun = _Unfinished(blocks=noted.blocks, value_bytes=noted.value_bytes)
        lengths = [(len(output.before), False), (noted.value_bytes, True)]
        if noted.blocks == blocks:
            lengths.append((len(output.after), False))
        for length, is_values in lengths:
            while length:
                self._check()
                data = stream.read(min(length, LARGEST_BLOCK))
                if not data:
                    return None
                self._digest.update(data)
                begun.whole.update(data)
                if is_values:
                    begun.values.update(data)
                length -= len(data)
        return begun if begun.noted() == noted else None

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _note(journal: TextIO, number: int, noted: _Noted) -> None:
    line = f"{number} {noted.blocks} {noted.value_bytes} {noted.whole}"
    journal.write(f"{line} {xxhash.xxh3_64_hexdigest(line.encode())}\n")
    journal.flush()


def _read_journal(path: Path) -> dict[int, _Noted]:
    """By tensor, what is recorded last; a truncated line fails its checksum and is ignored."""
    noted: dict[int, _Noted] = {}
    for line in _lines(path):
        text, _, check = line.rpartition(" ")
        words = text.split(" ")
        if len(words) == 4 and check == xxhash.xxh3_64_hexdigest(text.encode()):
            noted[int(words[0])] = _Noted(int(words[1]), int(words[2]), words[3])
    return noted


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(errors="replace").splitlines()


def _write(stream: BinaryIO, data: Any) -> None:
    view = memoryview(data)
    while len(view):
        view = view[stream.write(view) :]
