"""Token files in Megatron's .bin / .idx format: read through a memory map, written document by document.

The .bin holds the tokens of all documents one after the other; ``token_index.py`` says what the .idx holds.
"""

import bisect
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_qwen.data.token_files.manifest import LOSS_BITS, LOSS_UNIT, MEMBER, read_manifest, with_ending
from megatron_qwen.data.token_files.object_store import StoredArray
from megatron_qwen.data.token_files.token_index import DTYPES, HEADER, read_header, token_dtype, write_index
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import publish, sync_stream, temporary_name

_DOCUMENTS = 1 << 20


class TokenFile:
    """A token file, opened without reading it: memory use does not grow with its size.

    Args:
        prefix: path without the .bin / .idx ending.
        url: of the .bin and the .mask in an object store, without ending; None: they are next to the .idx.

    Raises:
        DataError: a file is missing, is not a token file, or is shorter than its index says.
    """

    def __init__(self, prefix: str | Path, *, url: str | None = None) -> None:
        self.prefix = Path(prefix)
        self.url = url
        if not self.prefix.name:
            raise DataError(Problem("token file", prefix, "is not the prefix of a .bin / .idx pair."))
        idx, bin_ = (with_ending(self.prefix, ending) for ending in (".idx", ".bin"))
        for path in (idx, bin_) if url is None else (idx,):
            if not path.is_file():
                raise DataError(Problem(str(path), None, "no such token file; `mq data prepare` makes it."))
        code, self.num_documents, _ = read_header(idx)
        self.dtype = np.dtype(DTYPES[code])
        index = np.memmap(idx, dtype=np.uint8, mode="r")
        body = HEADER.size
        self._lengths: npt.NDArray[np.int32] = index[body : body + 4 * self.num_documents].view(np.int32)
        body += 4 * self.num_documents
        self._offsets: npt.NDArray[np.int64] = index[body : body + 8 * self.num_documents].view(np.int64)
        width, last, length = self.dtype.itemsize, int(self._offsets[-1]), int(self._lengths[-1])
        if last < 0 or last % width or length < 0:
            raise DataError(Problem(str(idx), None, "is damaged: its last entry is not valid; prepare the data again."))
        self.num_tokens = last // width + length
        if self.num_tokens == 0:
            raise DataError(Problem(str(idx), None, "holds no tokens; prepare it from text that is not empty."))
        self._tokens = self._open(".bin", self.dtype, self.num_tokens)
        noted = read_manifest(self.prefix) if url is not None else None
        mask = with_ending(self.prefix, ".mask")
        self.has_mask = mask.is_file() if url is None else noted is not None and noted.mask_xxh3_128 is not None
        self.loss_unit = 1
        if self.has_mask:
            self._mask = self._open(".mask", np.dtype(np.uint8), self.num_tokens)
            noted = read_manifest(self.prefix) if noted is None else noted
            self.loss_unit = 1 if noted is None else int(noted.chat.get(LOSS_UNIT, 1))

    def _open(self, ending: str, dtype: np.dtype[Any], count: int) -> Any:
        """``count`` numbers of a file, as a memory map or in an object store; a slice reads only what it needs."""
        needed = count * dtype.itemsize
        if self.url is not None:
            stored = StoredArray(self.url + ending, dtype)
            where, size = stored.url, stored.size
        else:
            path = with_ending(self.prefix, ending)
            where, size = str(path), path.stat().st_size
        if size < needed:
            raise DataError(Problem(where, None, f"is cut off: it has {size} bytes, the index requires {needed}."))
        return stored if self.url is not None else np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    def index_damage(self) -> str | None:
        """The first inconsistency of the index, else None; reads all of it, in pieces."""
        end = 0
        for first in range(0, self.num_documents, _DOCUMENTS):
            lengths = self._lengths[first : first + _DOCUMENTS].astype(np.int64)
            if (lengths < 0).any():
                return f"document {first + int(np.argmax(lengths < 0))} has a negative length"
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            expected = np.concatenate(([end], ends[:-1]))
            if (wrong := expected != self._offsets[first : first + _DOCUMENTS]).any():
                return f"document {first + int(np.argmax(wrong))} does not begin where the one before it ends"
            end = int(ends[-1])
        return None

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int32]:
        """Lengths of documents first .. stop - 1, copied."""
        return np.array(self._lengths[first:stop])

    def document_at(self, position: int) -> int:
        """The document that holds a token of the stream."""
        return bisect.bisect_right(self._offsets, position * self.dtype.itemsize) - 1

    def document_start(self, document: int) -> int:
        """Position of a document's first token in the stream; of the end for ``num_documents``."""
        if document == self.num_documents:
            return self.num_tokens
        start = int(self._offsets[document]) // self.dtype.itemsize
        if not 0 <= start <= self.num_tokens:
            raise self._damaged(f"document {document} begins at token {start} of {self.num_tokens}")
        return start

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens of the stream from ``start`` up to ``stop``, copied."""
        copied: npt.NDArray[np.int64] = self._tokens[start:stop].astype(np.int64)
        return copied

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """How much the loss of tokens start .. stop - 1 counts as labels, in 1 / ``loss_unit``; copied."""
        if not self.has_mask:
            return np.ones(stop - start, dtype=np.uint8)
        weights: npt.NDArray[np.uint8] = np.array(self._mask[start:stop]) & np.uint8(LOSS_BITS)
        return weights

    def raw_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The .mask as it is: weights, and where members of a document begin; copied."""
        return np.array(self._mask[start:stop]) if self.has_mask else np.ones(stop - start, dtype=np.uint8)

    def member_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in [start, stop) where a further sequence of the same document begins, such as the rejected one."""
        if not self.has_mask:
            return np.zeros(0, dtype=np.int64)
        return start + np.flatnonzero(np.array(self._mask[start:stop]) & MEMBER)

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """All tokens of one document."""
        return self.tokens(self.document_start(index), self.document_start(index + 1))

    def document_ends(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in [start, stop) of the last tokens of documents."""
        width = self.dtype.itemsize
        # bisect reads a few entries; numpy's search would copy the whole unaligned map.
        first = bisect.bisect_left(self._offsets, (start + 1) * width)
        last = bisect.bisect_right(self._offsets, stop * width)
        ends = self._offsets[first:last].astype(np.int64) // width - 1
        if stop == self.num_tokens:
            ends = np.append(ends, stop - 1)
        if len(ends) and (ends.min() < start or ends.max() >= stop or (np.diff(ends) < 0).any()):
            raise self._damaged(f"its documents are not in order around token {start}")
        return ends

    def _damaged(self, what: str) -> DataError:
        path = with_ending(self.prefix, ".idx")
        return DataError(Problem(str(path), None, f"is damaged: {what}; prepare the data again."))


class TokenFileWriter:
    """Writes a token file; the files get their names in ``close``, when they are complete.

    Args:
        prefix: path without the .bin / .idx ending.
        vocab_size: decides the width: 16 bits below 65,536 ids, else 32.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.dtype = token_dtype(vocab_size)
        self._temporary = temporary_name(with_ending(self.prefix, ".bin"))
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
        """Writes the index and renames both files to their final names."""
        sync_stream(self._bin)
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype=np.int32)
        index = temporary_name(with_ending(self.prefix, ".idx"))
        write_index(index, lambda: iter([lengths]), documents=len(lengths), dtype=self.dtype)
        publish(self._temporary, with_ending(self.prefix, ".bin"))
        publish(index, with_ending(self.prefix, ".idx"))

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
