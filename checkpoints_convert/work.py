"""The directory of a conversion under way, which can be killed at any moment and resumed.

Everything goes to ``.NAME.partial`` next to the output directory, which appears by one rename when it is
complete. The plan next to the files records everything that determines their bytes, so the same command recognises
its own work there and resumes.
"""

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checkpoints_convert.file_writer import Digest, FileWriter, Stopped, Written, block_bytes
from checkpoints_convert.output import OutputFile
from checkpoints_convert.progress import ByteProgress, free_bytes, gb
from megatron_qwen.errors import CheckpointError, ConversionError, DataError, DiskFullError, Problem
from megatron_qwen.files import LockHeldError, atomic_write, exclusive_lock, is_temporary, publish, sync_tree

log = logging.getLogger(__name__)
_JOURNAL, _PLAN = ".journal", ".plan.json"
# Room for configuration, tokenizer and metadata in addition to the tensors.
_SMALL_FILES = 64 << 20


class OccupiedError(ConversionError):
    """The output directory already exists (exit 3)."""


class UnfinishedError(ConversionError):
    """What is written is right and stays for the next attempt; something else is missing to finish (exit 3)."""


class Work:
    """The directory of a conversion under way. Made by ``begin``.

    Args:
        directory: where the files are written.
        out: where they appear.
    """

    def __init__(self, directory: Path, out: Path) -> None:
        self.directory, self.out = directory, out
        self._stop = threading.Event()

    @property
    def notes(self) -> Path:
        """Folder of the journals and of other files that only the work needs; removed when the work is done."""
        path = self.directory / _JOURNAL
        path.mkdir(exist_ok=True)
        return path

    def left_to_write(self, files: Sequence[OutputFile]) -> int:
        """Bytes that are still to be written."""
        there = sum(_size(self.directory / file.name) for file in files)
        return max(0, sum(file.size for file in files) - there)

    def require_room(self, files: Sequence[OutputFile]) -> None:
        """Raises DiskFullError if the files do not fit."""
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
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            writers = {
                file.name: FileWriter(
                    file,
                    self.directory / file.name,
                    self.notes / file.name,
                    new_digest=new_digest,
                    block=block_bytes(files),
                    progress=progress,
                    stop=self._stop,
                )
                for file in files
            }
            pending = {name: pool.submit(writer.write) for name, writer in writers.items()}
            try:
                wait(pending.values(), return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        failures = [
            error for future in pending.values() if not future.cancelled() and (error := future.exception()) is not None
        ]
        for failure in failures:
            # A full disk is reported first: it explains the failures of the other writers, and it can be resumed.
            if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(files) from None
        for failure in failures:
            if not isinstance(failure, Stopped):
                raise failure
        return {name: future.result() for name, future in pending.items()}

    def _full(self, files: Sequence[OutputFile]) -> DiskFullError:
        needed = self.left_to_write(files) + _SMALL_FILES
        fix = (
            f"the disk is full: {needed:,} bytes ({gb(needed)}) more are needed and {free_bytes(self.directory):,} are "
            "free. What is written so far is kept; free some space and run the same command again."
        )
        return DiskFullError(Problem(str(self.directory), None, fix))

    def commit(self) -> None:
        """Syncs all files, then renames the work directory to ``out``.

        Raises:
            OccupiedError: ``out`` was created meanwhile.
        """
        sync_tree(self.directory)
        try:
            publish(self.directory, self.out, durable=True)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OccupiedError(_occupied(self.out)) from None
        clear_notes(self.out)


@contextmanager
def begin(out: Path, identity: dict[str, Any], *, restart: bool) -> Iterator[Work]:
    """Opens the work directory of a conversion, new or left by an earlier attempt.

    An interruption (a full disk, Ctrl-C, a kill) leaves the directory for the next attempt; an unusable source removes
    it.

    Args:
        out: the directory to make.
        identity: everything that determines its bytes.
        restart: discard an unfinished conversion of anything else.

    Raises:
        OccupiedError: ``out`` is occupied, another process writes it, or the work directory holds something else.
    """
    out = out.absolute()
    require_free(out)
    directory = out.with_name(f".{out.name}.partial")
    with _alone(directory, out):
        require_free(out)  # again, under the lock: another process may have finished it meanwhile
        _claim(directory, out, identity, restart=restart)
        try:
            yield Work(directory, out)
        except (CheckpointError, ConversionError, DataError) as error:
            # The source is unusable, so what was copied from it must not be resumed. OccupiedError is about ``out``:
            # the work is complete and stays. UnfinishedError says that it stays.
            if not isinstance(error, OccupiedError | UnfinishedError):
                _clear(directory)
                directory.rmdir()
            raise


@contextmanager
def _alone(directory: Path, out: Path) -> Iterator[None]:
    """Makes the work directory and keeps every other process out of it.

    Raises:
        OccupiedError: another process converts to ``out``, or a file is in the way.
    """

    def warn(said: str) -> None:
        log.warning("%s: make sure that no other process converts to %s", said, out)

    with ExitStack() as stack:
        while True:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise OccupiedError(
                    Problem(str(directory), None, "cannot be created: a file of that name exists.")
                ) from None
            try:
                stack.enter_context(exclusive_lock(directory, timeout_s=0, make=False, without_locks=warn))
                break
            except FileNotFoundError:  # between mkdir and lock another process renamed or removed it: make it again
                continue
            except LockHeldError:
                raise OccupiedError(Problem(str(out), None, "another process is converting to it right now.")) from None
        yield


def _clear(directory: Path) -> None:
    """Empties a work directory. The plan goes last: without it, what a kill leaves could not be recognised."""
    for path in directory.iterdir():
        if path.name != _PLAN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (directory / _PLAN).unlink(missing_ok=True)


def _claim(directory: Path, out: Path, identity: dict[str, Any], *, restart: bool) -> None:
    plan = directory / _PLAN
    wanted = json.dumps(identity, indent=1, sort_keys=True)
    there = [path for path in directory.iterdir() if not is_temporary(path)]
    if plan.is_file() and plan.read_text() == wanted:
        return
    if there and not plan.is_file():
        raise OccupiedError(
            Problem(str(directory), None, "is needed as the work directory and is not empty; remove it.")
        )
    if there and not restart:
        fix = (
            f"an unfinished conversion that differs in {_difference(plan, identity)} is in {directory}; repeat the "
            "command that began it, or pass --restart to discard it."
        )
        raise OccupiedError(Problem(str(out), None, fix))
    _clear(directory)
    atomic_write(plan, wanted)


def _difference(plan: Path, identity: dict[str, Any]) -> str:
    """Names of the entries in which an unfinished conversion differs, from its plan."""
    try:
        there: dict[str, Any] = json.loads(plan.read_text())
        wanted: dict[str, Any] = json.loads(json.dumps(identity))
        names = [name for name in sorted(there.keys() | wanted.keys()) if there.get(name) != wanted.get(name)]
        if "source" in names and (begun := there["source"].get("iteration")) != wanted["source"].get("iteration"):
            return f"iteration (it is of --iteration {begun})"
    except (ValueError, AttributeError, KeyError):
        names = []
    return ", ".join(names) or "everything"


def clear_notes(out: Path) -> None:
    """Removes from a finished directory what only the work needed."""
    shutil.rmtree(out / _JOURNAL, ignore_errors=True)
    (out / _PLAN).unlink(missing_ok=True)


def require_free(out: Path) -> None:
    """Raises OccupiedError where a directory cannot be made because something is there."""
    require_name(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise OccupiedError(_occupied(out))


def require_name(out: Path) -> None:
    """Raises OccupiedError of a path that has no name to appear under by a rename: the root."""
    if not out.absolute().name:
        raise OccupiedError(_occupied(out))


def _occupied(out: Path) -> Problem:
    return Problem(str(out), None, "already exists and is not empty; name a new directory or remove it.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
