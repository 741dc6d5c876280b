"""Token files of any size that take no room on disk."""

import struct
from pathlib import Path

import numpy as np


def write_sparse(prefix: Path, *, documents: int, length: int) -> Path:
    """A token file of zeros whose .bin is one hole.

    Args:
        prefix: path without ending.
        documents: how many.
        length: tokens in each, 16 bits wide.
    """
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        file.truncate(2 * documents * length)
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        file.write(np.full(documents, length, dtype=np.int32).tobytes())
        file.write((np.arange(documents, dtype=np.int64) * 2 * length).tobytes())
        file.write(np.arange(documents + 1, dtype=np.int64).tobytes())
    return prefix
