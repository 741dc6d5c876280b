"""Token files in Megatron's .bin / .idx format: read through a memory map, written document by document.

The .bin holds the tokens of all documents one after the other. The .idx holds a header, then per document its
length (int32) and byte offset (int64), then document boundaries (int64), as Megatron-LM's IndexedDataset reads
and writes it (megatron/core/datasets/indexed_dataset.py, version 1).
"""

import bisect
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_qwen.errors import DataError, Problem

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenFile:
    """A token file, opened without reading it: memory use does not grow with its size.

    Args:
        prefix: path without the .bin / .idx ending.

    Raises:
        DataError: a file is missing, is no token file, or is shorter than its index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        if not self.prefix.name:
            raise DataError(Problem("token file", prefix, "is no prefix of a .bin / .idx pair."))
        idx, bin_ = (self.prefix.with_name(self.prefix.name + ending) for ending in (".idx", ".bin"))
        for path in (idx, bin_):
            if not path.is_file():
                raise DataError(Problem(str(path), None, "no such token file; `mq data prepare` makes it."))
        code, self.num_documents, boundaries = _read_header(idx)
        self.dtype = np.dtype(_DTYPES[code])
        expected = _HEADER.size + self.num_documents * 12 + boundaries * 8
        if idx.stat().st_size < expected:
            raise DataError(Problem(str(idx), None, f"is cut off: {idx.stat().st_size} bytes, needs {expected}."))
        if self.num_documents == 0:
            raise DataError(Problem(str(idx), None, "holds no tokens; prepare it from text that is not empty."))
        index = np.memmap(idx, dtype=np.uint8, mode="r")
        body = _HEADER.size
        self._lengths: npt.NDArray[np.int32] = index[body : body + 4 * self.num_documents].view(np.int32)
        body += 4 * self.num_documents
        self._offsets: npt.NDArray[np.int64] = index[body : body + 8 * self.num_documents].view(np.int64)
        width, last, length = self.dtype.itemsize, int(self._offsets[-1]), int(self._lengths[-1])
        if last < 0 or last % width or length < 0:
            raise DataError(
                Problem(str(idx), None, "is damaged: its last document has no place; prepare the data again.")
            )
        self.num_tokens = last // width + length
        if self.num_tokens == 0:
            raise DataError(Problem(str(idx), None, "holds no tokens; prepare it from text that is not empty."))
        size, needed = bin_.stat().st_size, self.num_tokens * width
        if size < needed:
            raise DataError(Problem(str(bin_), None, f"is cut off: {size} bytes, the index names {needed}."))
        self._tokens = np.memmap(bin_, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def index_damage(self) -> str | None:
        """What is wrong with the index as a whole; reads all of it."""
        lengths = self._lengths.astype(np.int64)
        expected = np.concatenate(([0], np.cumsum(lengths[:-1]))) * self.dtype.itemsize
        if (lengths < 0).any():
            return f"document {int(np.argmax(lengths < 0))} has a negative length"
        if (wrong := expected != self._offsets).any():
            return f"document {int(np.argmax(wrong))} does not begin where the one before it ends"
        return None

    def document_start(self, document: int) -> int:
        """Position of a document's first token in the stream; of the end for ``num_documents``."""
        if document == self.num_documents:
            return self.num_tokens
        return int(self._offsets[document]) // self.dtype.itemsize

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens of the stream from ``start`` up to ``stop``, copied."""
        return self._tokens[start:stop].astype(np.int64)

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """All tokens of one document."""
        return self.tokens(self.document_start(index), self.document_start(index + 1))

    def document_ends(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in [start, stop) at which a document's last token lies."""
        width = self.dtype.itemsize
        # bisect reads a few entries; numpy's search would copy the whole unaligned map.
        first = bisect.bisect_left(self._offsets, (start + 1) * width)
        last = bisect.bisect_right(self._offsets, stop * width)
        ends = self._offsets[first:last].astype(np.int64) // width - 1
        if stop == self.num_tokens:
            ends = np.append(ends, stop - 1)
        return ends


def _read_header(path: Path) -> tuple[int, int, int]:
    """Code of the dtype, number of documents (Megatron: sequences), number of entries in the list of boundaries."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError(Problem(str(path), None, "is not a Megatron index file; `mq data prepare` makes them."))
    _, version, code, count, boundaries = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            Problem(str(path), None, f"has version {version} and dtype code {code}; only version 1 is read.")
        )
    return code, count, boundaries


class TokenFileWriter:
    """Writes a token file; nothing appears under its name until ``close`` has written all of it.

    Args:
        prefix: path without the .bin / .idx ending.
        vocab_size: decides the width: 16 bits below 65,536 ids, else 32.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.bin")
        self._bin = self._temporary.open("wb")
        self._lengths: list[int] = []
        self._digest = xxhash.xxh3_128()

    @property
    def digest(self) -> str:
        """xxh3-128 of the .bin so far."""
        return self._digest.hexdigest()

    def add(self, tokens: Iterable[int]) -> None:
        """Appends one document."""
        array = np.fromiter(tokens, dtype=self.dtype)
        self._bin.write(array.tobytes())
        self._digest.update(array.tobytes())
        self._lengths.append(len(array))

    def close(self) -> None:
        """Writes the index and gives both files their names."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=offsets[1:])
        code = next(code for code, kind in _DTYPES.items() if np.dtype(kind) == self.dtype)
        index = self._temporary.with_suffix(".idx")
        with index.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._temporary.replace(self.prefix.with_name(self.prefix.name + ".bin"))
        index.replace(self.prefix.with_name(self.prefix.name + ".idx"))

    def discard(self) -> None:
        """Removes what was written."""
        self._bin.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
