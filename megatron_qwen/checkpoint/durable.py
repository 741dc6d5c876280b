"""Waits until what was written is on the disk."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Has the kernel write a file's bytes, or a directory's entries, to the disk; returns when they are there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
