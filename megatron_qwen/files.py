"""Atomic writes, fsync and locks between processes.

No other module renames a finished file, syncs or locks. A kill at any time leaves a file complete or absent. A
temporary file is in the directory of its target, because a rename is atomic only within one file system.
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
    """Replaces a file; a reader at any time, also after a kill, finds the old content or all of the new.

    Args:
        path: the file. One that exists keeps its mode.
        content: its bytes; text is written as UTF-8.
        durable: return only when the content and the name are on the disk (fsync of file and directory).

    Raises:
        OSError: names ``path``, which is unchanged.
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
        durable: return only when the content and the name are on the disk.
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
    """``atomic_open`` for a library that opens files by path: gives the path of an empty file, which the body fills."""
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
        # O_EXCL: no other writer has this file. 0600 at first, because the file that it replaces may be private.
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
    """A unique name in the directory of ``path``: ``.NAME.1f0c93ab.tmp``."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a name is one of ``temporary_name``: a writer is at work, or was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def publish(temporary: Path, path: Path, *, durable: bool = False) -> None:
    """Renames a finished file or directory to its final name.

    Args:
        temporary: the finished file or directory, in the same file system. Where the result must survive a power
            failure, the caller syncs its content first (``sync``, ``sync_tree``).
        path: the final name. A file replaces a file, a directory an empty directory.
        durable: return only when the new name is on the disk. A rename is an entry of the directory, so that is synced.
    """
    temporary.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file's content or of a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_stream(stream: IO[Any]) -> None:
    """Flush and fsync of an open file."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_tree(directory: Path) -> None:
    """fsync of a directory and of all files and directories under it."""
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
    """Holds an exclusive lock for the body.

    Args:
        path: the file or directory to lock. The body may remove or rename it.
        timeout_s: seconds to wait; 0 tries once, None waits without limit.
        make: create an empty file where ``path`` does not exist. Otherwise it must exist.
        inherited: processes forked in the body also hold the lock, even after this one has died (flock). Otherwise the
            lock belongs to this process alone and does not exclude its own threads (lockf).
        without_locks: called with one line where the file system has no locks, and the body runs unlocked; None raises.

    Raises:
        LockHeldError: another process still holds the lock after the timeout.
        OSError: ``path`` does not exist or cannot be created, or the file system has no locks.
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
            # Closing is not enough: a process forked in the body has a copy of the descriptor, which keeps a flock.
            lock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _acquired(
    path: Path, flags: int, lock: Callable[[int], None], without_locks: Callable[[str], object] | None
) -> int | None:
    """A descriptor that holds the lock; None where another process holds it."""
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
            # Between opening and locking, the previous holder may have removed or renamed the file: then try again.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
