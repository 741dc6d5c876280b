"""The .idx of a token file: reads its header, and writes it without holding it in memory.

Megatron-LM's format (megatron/core/datasets/indexed_dataset.py, version 1): a header, then per document its length
(int32), its byte offset in the .bin (int64), and document boundaries (int64), one more than documents.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import sync_stream

HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}
_MAGIC = b"MMIDIDX\x00\x00"
_ENTRIES = 1 << 20

Lengths = Callable[[], Iterator[npt.NDArray[np.int32]]]


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Width of a token: 16 bits where all ids fit, else 32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def read_header(path: Path) -> tuple[int, int, int]:
    """Code of the dtype, number of documents (Megatron: sequences), number of entries in the list of boundaries.

    Raises:
        DataError: the file is not an index of a supported version, or is shorter than its header says.
    """
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(head) < HEADER.size or not head.startswith(_MAGIC):
        raise DataError(Problem(str(path), None, "is not a Megatron index file; `mq data prepare` makes them."))
    _, version, code, count, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(
            Problem(
                str(path), None, f"has version {version} and dtype code {code}, which is not supported (version 1 is)."
            )
        )
    expected = HEADER.size + count * 12 + boundaries * 8
    if size < expected:
        raise DataError(Problem(str(path), None, f"is cut off: it has {size} bytes, its header requires {expected}."))
    if count == 0:
        raise DataError(Problem(str(path), None, "holds no tokens; prepare it from text that is not empty."))
    return code, count, boundaries


def write_index(path: Path, lengths: Lengths, *, documents: int, dtype: np.dtype[np.generic]) -> None:
    """Writes an index and syncs it.

    Args:
        path: where it goes.
        lengths: returns an iterator over the lengths of all documents, in arrays; it is called twice.
        documents: how many there are.
        dtype: of the tokens.
    """
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    with path.open("wb") as file:
        file.write(HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
        for some in lengths():
            file.write(np.ascontiguousarray(some, dtype=np.int32).data)
        end = 0
        for some in lengths():
            ends = end + np.cumsum(some, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate(([end], ends[:-1])).astype(np.int64).data if len(some) else b"")
            end = int(ends[-1]) if len(some) else end
        for first in range(0, documents + 1, _ENTRIES):
            file.write(np.arange(first, min(first + _ENTRIES, documents + 1), dtype=np.int64).data)
        sync_stream(file)
