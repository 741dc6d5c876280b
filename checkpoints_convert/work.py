"""Writes the files of a conversion so that it can be killed at any moment and gone on with.

Everything goes to ``.NAME.partial`` beside the directory that is to be made, which appears by one rename when it is
complete. A journal a file notes the hash of every tensor once it is written; the same command reads back what it
finds, keeps the tensors whose bytes are as noted, and writes the rest. So a kill costs the tensors that were being
written at that moment.
"""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson
import torch
import xxhash

from checkpoints_convert.output import OutputFile, Record, cast
from checkpoints_convert.progress import ByteProgress, free_bytes, gb
from megatron_qwen.errors import CheckpointError, ConversionError, DataError, DiskFullError, Problem

BLOCK_BYTES = 1 << 24
_JOURNAL, _PLAN = ".journal", ".plan.json"
# Room for configuration, tokenizer and metadata beside the tensors.
_SMALL_FILES = 64 << 20


class Digest(Protocol):
    """A running hash."""

    def update(self, data: Any, /) -> None:
        """Takes bytes."""

    def copy(self) -> Any:
        """The same state, apart."""

    def hexdigest(self) -> str:
        """The hash so far."""


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


class OccupiedError(ConversionError):
    """Where a directory is to be made, something is already (exit 3)."""


class _Stopped(Exception):
    """Another file failed."""


class Work:
    """The directory of a conversion under way. Made by ``begin``.

    Args:
        directory: where the files are written.
        out: where they appear.
    """

    def __init__(self, directory: Path, out: Path) -> None:
        self.directory, self.out = directory, out
        self._stop = threading.Event()

    def left_to_write(self, files: Sequence[OutputFile]) -> int:
        """Bytes that are not there yet."""
        there = sum(_size(self.directory / file.name) for file in files)
        return max(0, sum(file.size for file in files) - there)

    def require_room(self, files: Sequence[OutputFile]) -> None:
        """Raises DiskFullError where the files cannot fit."""
        needed, free = self.left_to_write(files) + _SMALL_FILES, free_bytes(self.directory)
        if needed > free:
            fix = f"{needed:,} bytes ({gb(needed)}) are needed and {free:,} are free; make room or choose another disk."
            raise DiskFullError(Problem(str(self.out), None, fix))

    def write(
        self, files: Sequence[OutputFile], *, new_digest: Callable[[], Digest], workers: int, progress: ByteProgress
    ) -> dict[str, Written]:
        """Writes the files, or what is missing of them, several at a time.

        Args:
            files: what to write.
            new_digest: begins the hash of a file.
            workers: threads, each on a file of its own.
            progress: told of every byte.

        Raises:
            DiskFullError: what is written so far stays.
            UserError: a tensor cannot be read; whatever the source says.
        """
        (self.directory / _JOURNAL).mkdir(exist_ok=True)
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            pending = {file.name: pool.submit(self._file, file, new_digest, progress) for file in files}
            try:
                wait(pending.values(), return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        failures = [
            error for future in pending.values() if not future.cancelled() and (error := future.exception()) is not None
        ]
        for failure in failures:
            if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(files) from None
        for failure in failures:
            if not isinstance(failure, _Stopped):
                raise failure
        return {name: future.result() for name, future in pending.items()}

    def _full(self, files: Sequence[OutputFile]) -> DiskFullError:
        needed = self.left_to_write(files) + _SMALL_FILES
        fix = (
            f"the disk is full: {needed:,} bytes ({gb(needed)}) more are needed and {free_bytes(self.directory):,} are "
            "free. What is written is kept; make room and run the same command again."
        )
        return DiskFullError(Problem(str(self.directory), None, fix))

    def _file(self, file: OutputFile, new_digest: Callable[[], Digest], progress: ByteProgress) -> Written:
        path, journal = self.directory / file.name, self.directory / _JOURNAL / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        journal.parent.mkdir(parents=True, exist_ok=True)
        done = Written(size=file.size)
        lines = journal.read_text().splitlines() if journal.is_file() and path.is_file() else []
        with path.open("r+b" if path.is_file() else "w+b", buffering=0) as stream:
            digest, kept = self._keep(file, stream, lines, new_digest, done, progress)
            stream.truncate(stream.tell())
            _replace(journal, "".join(f"{line}\n" for line in lines[:kept]))
            if not kept:
                stream.write(file.header)
                digest.update(file.header)
                done.parts[:] = [(len(file.header), xxhash.xxh3_128_hexdigest(file.header))] if file.header else []
            with journal.open("a") as notes:
                for record in file.records[max(0, kept) :]:
                    notes.write(self._record(record, stream, digest, done, progress) + "\n")
                    notes.flush()
            os.fsync(stream.fileno())
        done.digest = digest.hexdigest()
        return done

    def _record(self, record: Record, stream: BinaryIO, digest: Digest, done: Written, progress: ByteProgress) -> str:
        """Writes one tensor; its line of the journal."""
        values, whole = xxhash.xxh3_128(), xxhash.xxh3_128()

        def put(data: Any) -> None:
            digest.update(data)
            whole.update(data)
            _write(stream, data)

        put(record.before)
        for block in self._blocks(record):
            data = memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())
            values.update(data)
            put(data)
            progress.add(len(data))
        put(record.after)
        done.tensors[record.name] = values.hexdigest()
        done.parts.append((record.size, whole.hexdigest()))
        return f"{values.hexdigest()} {whole.hexdigest()} {xxhash.xxh3_64_hexdigest(values.digest() + whole.digest())}"

    def _blocks(self, record: Record) -> Iterator[torch.Tensor]:
        rows = max(1, BLOCK_BYTES // max(1, record.row_bytes))
        for piece in record.pieces:
            for start in range(0, piece.rows, rows):
                if self._stop.is_set():
                    raise _Stopped
                yield cast(piece.read(start, min(piece.rows, start + rows)), record)

    def _keep(
        self,
        file: OutputFile,
        stream: BinaryIO,
        lines: Sequence[str],
        new_digest: Callable[[], Digest],
        done: Written,
        progress: ByteProgress,
    ) -> tuple[Digest, int]:
        """Reads back what an earlier attempt wrote; leaves the stream behind the last tensor that is as noted."""
        digest = new_digest()
        if not lines or stream.read(len(file.header)) != file.header:
            stream.seek(0)
            return digest, 0
        digest.update(file.header)
        if file.header:
            done.parts.append((len(file.header), xxhash.xxh3_128_hexdigest(file.header)))
        at, kept = len(file.header), 0
        for record, line in zip(file.records, lines, strict=False):
            noted = _parse(line)
            before = digest.copy()
            if noted is None or not self._is_there(record, stream, digest, noted[1]):
                digest = before
                break
            at, kept = at + record.size, kept + 1
            done.tensors[record.name] = noted[0]
            done.parts.append((record.size, noted[1]))
            done.kept_bytes += record.value_bytes
            progress.add(record.value_bytes)
        stream.seek(at)
        if not kept:  # begin anew, header included
            stream.seek(0)
            done.parts.clear()
            return new_digest(), 0
        return digest, kept

    def _is_there(self, record: Record, stream: BinaryIO, digest: Digest, noted: str) -> bool:
        found, left = xxhash.xxh3_128(), record.size
        while left:
            if self._stop.is_set():
                raise _Stopped
            data = stream.read(min(left, BLOCK_BYTES))
            if not data:
                return False
            found.update(data)
            digest.update(data)
            left -= len(data)
        return found.hexdigest() == noted

    def commit(self) -> None:
        """Makes the directory appear.

        Raises:
            OccupiedError: something has come into its place meanwhile.
        """
        for folder, _, names in os.walk(self.directory):
            for path in [*(Path(folder) / name for name in names), Path(folder)]:
                _sync(path)
        try:
            self.directory.rename(self.out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OccupiedError(_occupied(self.out)) from None
        clear_notes(self.out)
        _sync(self.out.parent)


@contextmanager
def begin(out: Path, identity: dict[str, Any], *, restart: bool) -> Iterator[Work]:
    """Opens the work directory of a conversion, or goes on with the one that is there.

    What stops a conversion and can be mended (a full disk, Ctrl-C, a kill) leaves the directory; what makes its
    source unusable removes it.

    Args:
        out: the directory to make.
        identity: all that decides its bytes.
        restart: throw away an unfinished conversion of anything else.

    Raises:
        OccupiedError: ``out`` is occupied, another process is at it, or something else lies in the work directory.
    """
    require_free(out)
    directory = out.with_name(f".{out.name}.partial")
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OccupiedError(Problem(str(out), None, "another process is converting to it right now.")) from None
        _claim(directory, out, identity, restart=restart)
        try:
            yield Work(directory, out)
        except (CheckpointError, ConversionError, DataError) as error:
            if not isinstance(error, OccupiedError):
                shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _claim(directory: Path, out: Path, identity: dict[str, Any], *, restart: bool) -> None:
    plan = directory / _PLAN
    wanted = orjson.dumps(identity, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    there = [path for path in directory.iterdir() if path.name != f"{_PLAN}.part"]
    if plan.is_file() and plan.read_bytes() == wanted:
        return
    if there and not plan.is_file():
        raise OccupiedError(Problem(str(directory), None, "is needed for the work and is not empty; remove it."))
    if there and not restart:
        fix = (
            f"an unfinished conversion with another source or other options lies in {directory}; repeat the command "
            "that began it, or give --restart to throw it away."
        )
        raise OccupiedError(Problem(str(out), None, fix))
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _replace(plan, wanted.decode())


def clear_notes(out: Path) -> None:
    """Removes from a finished directory what only the work needed."""
    shutil.rmtree(out / _JOURNAL, ignore_errors=True)
    (out / _PLAN).unlink(missing_ok=True)


def require_free(out: Path) -> None:
    """Raises OccupiedError where a directory cannot be made because something is there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise OccupiedError(_occupied(out))


def _occupied(out: Path) -> Problem:
    return Problem(str(out), None, "exists already and is not empty; name a new directory or remove it.")


def _parse(line: str) -> tuple[str, str] | None:
    """A journal's line, or None where it was cut off."""
    words = line.split(" ")
    if len(words) != 3:
        return None
    values, whole, check = words
    try:
        good = check == xxhash.xxh3_64_hexdigest(bytes.fromhex(values) + bytes.fromhex(whole))
    except ValueError:
        return None
    return (values, whole) if good else None


def _write(stream: BinaryIO, data: Any) -> None:
    view = memoryview(data)
    while len(view):
        view = view[stream.write(view) :]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
