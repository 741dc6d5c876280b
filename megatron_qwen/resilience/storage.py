"""Faults of the file system that a run is written to: by their errno, or by what is left of it in a message."""

import contextlib
import errno
import os
from pathlib import Path

from megatron_qwen.files import sync_stream, temporary_name

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NUMBERS = (
    *_FULL,
    *(errno.EROFS, errno.EIO),  # read-only, broken
    # A server of a shared file system is gone, or has put this client out.
    *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ENODEV),
)
# Connections of ranks time out and break too, and a GPU is a device: in a message these words are not enough.
_OF_OTHERS = (errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV)
_SIGNS = tuple(os.strerror(number) for number in _NUMBERS if number not in _OF_OTHERS)
_FULL_SIGNS = tuple(map(os.strerror, _FULL))
# As much as the small files of an attempt: a file system that takes this for itself may still refuse a checkpoint.
_PROBE = bytes(64 << 10)


def is_fault(error: OSError, directory: Path | None = None) -> bool:
    """Whether an error is of the file system, and not of what was asked of it.

    Args:
        error: as it was raised.
        directory: that was there before. If it is not now, its file system is not mounted any more.
    """
    gone = error.errno == errno.ENOENT and directory is not None and not os.path.isdir(directory)  # noqa: PTH112
    return error.errno in _NUMBERS or gone


def names_fault(text: str) -> bool:
    """Whether a message names a fault of a file system."""
    return any(sign in text for sign in _SIGNS)


def names_full(text: str) -> bool:
    """Whether it says that a file system is full, which is so for all its clients."""
    return any(sign in text for sign in _FULL_SIGNS)


def fault_in(directory: Path) -> str | None:
    """What is wrong with the file system of a directory, by writing a small file there; None if that works."""
    path = temporary_name(directory / "probe")
    try:
        with path.open("wb") as file:
            file.write(_PROBE)
            sync_stream(file)
    except OSError as error:
        return f"{error.strerror} in {directory}"
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None
