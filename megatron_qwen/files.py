"""Files that are complete or absent whenever a process is killed, and locks between processes.

The only file that renames what was written, waits for the disk or locks. A temporary file is in the directory of the
file that it becomes, because a rename is atomic within one file system only.
"""

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_POLL_S = 0.05
# flock says EWOULDBLOCK, which is EAGAIN on Linux; POSIX lets lockf say EACCES as well.
_HELD = (errno.EAGAIN, errno.EACCES)


class LockHeldError(Exception):
    """Another process holds the lock."""


def atomic_write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replaces a file; whoever reads it meanwhile, or after a kill, finds the old content or all of the new.

    Args:
        path: the file. One that exists keeps its mode.
        content: its bytes; text is written as UTF-8.
        durable: return only when the content and the name are on the disk.

    Raises:
        OSError: names ``path``, which is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with atomic_open(path, durable=durable) as stream:
            stream.write(data)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it means
        raise


def atomic_write_json(path: Path, content: Any, *, indent: int | None = 2, durable: bool = False) -> None:
    """Replaces a file by a value in JSON and a line end; see ``atomic_write``."""
    atomic_write(path, json.dumps(content, indent=indent) + "\n", durable=durable)


@contextmanager
def atomic_open(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A stream whose bytes replace the file when the body ends, and are removed when it raises.

    Args:
        path: the file. One that exists keeps its mode.
        durable: end only when the content and the name are on the disk.
    """
    with _temporary_of(path) as temporary:
        with temporary.open("wb") as stream:
            yield stream
            _keep_mode(temporary, path)
            if durable:
                sync_stream(stream)
        publish(temporary, path, durable=durable)


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """``atomic_open`` for a library that opens files itself: the path of an empty file, which the body fills."""
    with _temporary_of(path) as temporary:
        yield temporary
        _keep_mode(temporary, path)
        if durable:
            sync(temporary)
        publish(temporary, path, durable=durable)


@contextmanager
def _temporary_of(path: Path) -> Iterator[Path]:
    """A new empty file; removed when the body raises, and then an error that names it names ``path`` instead."""
    temporary = temporary_name(path)
    try:
        # O_EXCL: no two writers have the same. What replaces a private file is private from the beginning.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(os.open(temporary, flags, 0o600 if path.exists() else 0o666))
        yield temporary
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


def _keep_mode(temporary: Path, path: Path) -> None:
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)


def temporary_name(path: Path) -> Path:
    """A name in the directory of ``path`` that no other writer has: ``.NAME.1f0c93ab.tmp``."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file or directory has a name of ``temporary_name``: another process writes it, or was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def publish(temporary: Path, path: Path, *, durable: bool = False) -> None:
    """Gives a finished file or directory its name, by one rename.

    Args:
        temporary: what is finished, in the same file system. What is inside is synced before, by ``sync`` or
            ``sync_tree``, where the result must outlast a power failure.
        path: its name. A file replaces a file, a directory an empty directory.
        durable: return only when the name is on the disk.
    """
    temporary.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_stream(stream: IO[Any]) -> None:
    """Returns when what was written to an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_tree(directory: Path) -> None:
    """Returns when all files and directories under a directory, and its own entries, are on the disk."""
    for folder, _, names in os.walk(directory):
        for path in [*(Path(folder) / name for name in names), Path(folder)]:
            sync(path)


@contextmanager
def exclusive_lock(
    path: Path,
    *,
    timeout_s: float | None = None,
    make: bool = True,
    inherited: bool = True,
    without_locks: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Keeps every other process that asks for the same lock out of the body.

    Args:
        path: what is locked. The body may remove or rename it.
        timeout_s: seconds to wait for it; 0 asks once, None waits for as long as it takes.
        make: make an empty file where nothing has that name. Else a file or directory must be there.
        inherited: processes forked in the body hold it too, even when this one is dead (flock). Else it is this
            process's alone (lockf), and does not keep its own threads apart.
        without_locks: is told in one line of a file system without locks, and the body runs unlocked; None raises.

    Raises:
        LockHeldError: another process holds it still after the timeout.
        OSError: there is no such file or it cannot be made, or the file system has no locks.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    lock = fcntl.flock if inherited else fcntl.lockf
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if make else os.O_RDONLY
    operation = fcntl.LOCK_EX if deadline is None else fcntl.LOCK_EX | fcntl.LOCK_NB
    while (descriptor := _acquired(path, flags, lambda it: lock(it, operation), without_locks)) is None:
        if deadline is not None and time.monotonic() >= deadline:
            raise LockHeldError(str(path))
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        with suppress(OSError):
            # Closing is not enough: a process forked in the body has a copy of the descriptor.
            lock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _acquired(
    path: Path, flags: int, lock: Callable[[int], None], without_locks: Callable[[str], object] | None
) -> int | None:
    """The descriptor that holds the lock; None where another process has it."""
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            lock(descriptor)
        except OSError as error:
            if error.errno not in _HELD and without_locks is not None:
                without_locks(f"{path.parent} has no locks ({error.strerror})")
                return descriptor
            os.close(descriptor)
            if error.errno not in _HELD:
                raise OSError(error.errno, f"no locks in this file system ({error.strerror})", str(path)) from None
            return None
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            # Between opening and locking, whoever held it may have removed or renamed what is locked now.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
