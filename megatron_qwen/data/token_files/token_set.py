"""One stream of tokens over the shards of a set; the tokens of a source of training data."""

import bisect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.token_files.manifest import Manifest, read_manifest, with_ending
from megatron_qwen.data.token_files.object_store import fetch_small_files, is_url
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.errors import DataError, Problem


class TokenSet:
    """Token files one after the other, as one stream of tokens and documents.

    Args:
        prefix: of a token file or of a set of shards; a path, or the URL of an object store.

    Raises:
        DataError: a file is missing, damaged or cut off; all such files are named.
    """

    def __init__(self, prefix: str | Path) -> None:
        url = str(prefix) if is_url(prefix) else None
        self.prefix = Path(prefix) if url is None else fetch_small_files(url, (".json", ".idx"))
        self.manifest: Manifest | None = None
        members: list[tuple[Path, str | None]] = [(self.prefix, url)]
        if self.prefix.name and not with_ending(self.prefix, ".idx").is_file():
            self.manifest = read_manifest(self.prefix)
            if self.manifest is not None and self.manifest.shards:
                members = [self._member(name, url) for name in self.manifest.shards]
        self.files = _open(members)
        self.token_starts = _starts([file.num_tokens for file in self.files])
        self.document_starts = _starts([file.num_documents for file in self.files])

    def _member(self, name: str, url: str | None) -> tuple[Path, str | None]:
        if url is None:
            return self.prefix.with_name(name), None
        own = f"{url.rsplit('/', 1)[0]}/{name}"
        return fetch_small_files(own, (".json", ".idx")), own

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.token_starts[-1]

    @property
    def num_documents(self) -> int:
        """Documents in all."""
        return self.document_starts[-1]

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start .. stop - 1 of the stream, copied."""
        first = bisect.bisect_right(self.token_starts, start) - 1
        if stop <= self.token_starts[first + 1]:
            base = self.token_starts[first]
            return self.files[first].tokens(start - base, stop - base)
        parts = [
            self.files[index].tokens(max(start, self.token_starts[index]) - self.token_starts[index], end)
            for index, end in self._pieces(first, stop)
        ]
        return np.concatenate(parts)

    @property
    def loss_unit(self) -> int:
        """The value of ``loss_mask`` where a token counts whole; all files with a mask have the same."""
        return max((file.loss_unit for file in self.files if file.has_mask), default=1)

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8] | None:
        """How much the loss of these tokens counts as labels, in 1 / ``loss_unit``; None where all count whole."""
        if not any(file.has_mask for file in self.files):
            return None
        if start >= stop:
            return np.zeros(0, dtype=np.uint8)
        first = bisect.bisect_right(self.token_starts, start) - 1
        return np.concatenate(
            [
                self.files[index].loss_mask(max(start, self.token_starts[index]) - self.token_starts[index], end)
                for index, end in self._pieces(first, stop)
            ]
        )

    def member_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in [start, stop) where a further sequence of the same document begins."""
        if start >= stop or not any(file.has_mask for file in self.files):
            return np.zeros(0, dtype=np.int64)
        first = bisect.bisect_right(self.token_starts, start) - 1
        return np.concatenate(
            [
                self.files[index].member_starts(max(start, base := self.token_starts[index]) - base, end) + base
                for index, end in self._pieces(first, stop)
            ]
        )

    def document_start(self, document: int) -> int:
        """Position of a document's first token; of the end for ``num_documents``."""
        if document == self.num_documents:
            return self.num_tokens
        index = bisect.bisect_right(self.document_starts, document) - 1
        return self.token_starts[index] + self.files[index].document_start(document - self.document_starts[index])

    def document_at(self, position: int) -> int:
        """The document that holds a token."""
        index = bisect.bisect_right(self.token_starts, position) - 1
        return self.document_starts[index] + self.files[index].document_at(position - self.token_starts[index])

    def document_ends(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in [start, stop) of the last tokens of documents."""
        first = bisect.bisect_right(self.token_starts, start) - 1
        found = []
        for index, end in self._pieces(first, stop):
            base = self.token_starts[index]
            found.append(base + self.files[index].document_ends(max(start, base) - base, end))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int32]:
        """Lengths of documents first .. stop - 1."""
        parts = []
        for index, file in enumerate(self.files):
            begin, end = self.document_starts[index], self.document_starts[index + 1]
            if begin < stop and end > first:
                parts.append(file.lengths(max(first, begin) - begin, min(stop, end) - begin))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def places(self, start: int, stop: int) -> list[str]:
        """Where tokens start .. stop - 1 come from, for a message: per file its documents, and which of their tokens.

        Documents and tokens are counted from 0, documents in their file and tokens in their document.
        """
        found = []
        first = bisect.bisect_right(self.token_starts, start) - 1
        for index, end in self._pieces(first, stop):
            file = self.files[index]
            begin = max(start - self.token_starts[index], 0)
            if begin == end:
                continue
            one, last = file.document_at(begin), file.document_at(end - 1)
            skipped, until = begin - file.document_start(one), end - 1 - file.document_start(last)
            name = f"{file.url or file.prefix}.bin"
            if one == last:
                tokens = f"token {skipped}" if skipped == until else f"tokens {skipped} to {until}"
                found.append(f"{name}, document {one}, {tokens}")
            else:
                found.append(f"{name}, documents {one} (from token {skipped}) to {last} (to token {until})")
        return found

    @cached_property
    def digest(self) -> str | None:
        """Hash of all tokens, from the manifest; None without a manifest."""
        noted = self.manifest or read_manifest(self.prefix)
        return None if noted is None else noted.bin_xxh3_128

    def _pieces(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Indices of files from ``first`` on that begin before ``stop``, each with the end position in that file."""
        found = []
        index = first
        while index < len(self.files) and self.token_starts[index] < stop:
            found.append((index, min(stop, self.token_starts[index + 1]) - self.token_starts[index]))
            index += 1
        return found


def _open(members: Sequence[tuple[Path, str | None]]) -> list[TokenFile]:
    files: list[TokenFile] = []
    problems: list[Problem] = []
    for member, url in members:
        try:
            files.append(TokenFile(member, url=url))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files


def _starts(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
