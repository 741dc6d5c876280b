"""Reads the header of a GGUF file without trust: every length is checked against the file before it is used."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from checkpoints_convert.formats.gguf.container import ALIGNMENT, FIXED, MAGIC, VERSION, ValueType
from checkpoints_convert.formats.gguf.types import GgmlType
from checkpoints_convert.unexpected_file import what_it_is
from megatron_qwen.errors import ConversionError, Problem

# Limits far above any real file. Qwen's 235B has 1,131 tensors; a vocabulary has 152,000 tokens and as many merges.
_MOST_TENSORS, _MOST_KEYS = 100_000, 10_000
_LARGEST_HEADER = 256 << 20
_LONGEST_NAME = 256  # bytes; GGML_MAX_NAME is 64
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_LARGEST_ALIGNMENT = 1 << 16
_ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Args:
        name: of the tensor.
        shape: from the outermost dimension.
        type: of its values.
        offset: first byte of its values in the file.
        path: the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    path: Path

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """Rows, over all outer dimensions."""
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class ParsedFile:
    """The header of a file.

    Args:
        keys: contents by name; arrays are lists.
        tensors: in the order of the file.
    """

    keys: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def parse(path: Path) -> ParsedFile:
    """The header of a file.

    Raises:
        ConversionError: it is no GGUF file, is cut off, or says what cannot be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Parser(path, file, size).parse()
    except OSError as error:
        raise ConversionError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None


class _Parser:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._left = min(size, _LARGEST_HEADER)

    def parse(self) -> ParsedFile:
        if self._size < 24 or self._file.read(len(MAGIC)) != MAGIC:
            fix = what_it_is(self._path) or "is no GGUF file."
            raise ConversionError(Problem(str(self._path), None, fix))
        self._left -= len(MAGIC)
        version = self._number("I")
        if version != VERSION:
            fix = f"must be {VERSION}, little endian; convert the file with a current llama.cpp."
            raise ConversionError(Problem(f"{self._path}: version", version, fix))
        tensors, count = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS or count > _MOST_KEYS:
            raise self._damaged(f"says that it has {tensors:,} tensors and {count:,} keys")
        keys: dict[str, Any] = {}
        for _ in range(count):
            name = self._text(_LONGEST_NAME)
            if name in keys:
                raise self._damaged(f"has the key {name[:80]!r} twice")
            keys[name] = self._value()
        alignment = keys.get(_ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"has the alignment {str(alignment)[:40]}")
        described = [self._tensor() for _ in range(tensors)]
        begin = -(-self._file.tell() // alignment) * alignment
        found = tuple(make(begin) for make in described)
        self._check_layout(found, begin, alignment)
        return ParsedFile(keys, found)

    def _tensor(self) -> Callable[[int], StoredTensor]:
        """Makes the tensor, once it is known where the values begin."""
        name = self._text(_LONGEST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"says that {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = GgmlType(number)
        except ValueError:
            known = ", ".join(item.name for item in GgmlType)
            fix = f"is a type that is not supported here; supported types: {known}."
            raise ConversionError(Problem(f"{self._path}: {name}", number, fix)) from None
        values = 1
        for length in shape:
            values *= length
        if not 0 < values < 1 << 48 or shape[-1] % kind.block_values:
            raise self._damaged(f"says that {name[:80]!r} has the shape {[*shape]} in {kind.name}")
        return lambda begin: StoredTensor(name, shape, kind, begin + offset, self._path)

    def _check_layout(self, tensors: tuple[StoredTensor, ...], begin: int, alignment: int) -> None:
        names = {item.name for item in tensors}
        if len(names) != len(tensors):
            raise self._damaged("has a tensor twice")
        at = begin
        for item in sorted(tensors, key=lambda item: item.offset):
            if item.offset != at:
                raise self._damaged(f"has {item.name[:80]!r} over another tensor, or behind a gap")
            at = item.offset + -(-item.size // alignment) * alignment
            # Padding behind the last tensor may be missing.
            if item.offset + item.size > self._size:
                raise self._damaged(f"ends before the values of {item.name[:80]!r} do: it is cut off")
        if self._size > at:
            raise self._damaged(f"has {self._size - at:,} bytes behind the last tensor")

    def _value(self) -> Any:
        kind = self._type()
        if kind is not ValueType.ARRAY:
            return self._one(kind)
        element, count = self._type(), self._number("Q")
        if element is ValueType.ARRAY:
            raise self._damaged("has arrays of arrays")
        if element is ValueType.STRING:
            if count * 8 > self._left:  # a text takes the 8 bytes of its length at least
                raise self._damaged(f"has an array of {count:,} texts")
            return [self._text(None) for _ in range(count)]
        letter = FIXED[element]
        width = struct.calcsize(f"<{letter}")
        if count * width > self._left:
            raise self._damaged(f"has an array of {count:,} values")
        return list(struct.unpack(f"<{count}{letter}", self._bytes(count * width)))

    def _one(self, kind: ValueType) -> Any:
        return self._text(None) if kind is ValueType.STRING else self._number(FIXED[kind])

    def _type(self) -> ValueType:
        number = self._number("I")
        try:
            return ValueType(number)
        except ValueError:
            raise self._damaged(f"has a key of type {number}") from None

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]

    def _text(self, longest: int | None) -> str:
        length = self._number("Q")
        if longest is not None and length > longest:
            raise self._damaged(f"has a name of {length:,} bytes")
        return self._bytes(length).decode(errors="replace")

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self._damaged("ends inside the header, or has one of absurd size")
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged("ends inside the header")
        self._left -= count
        return data

    def _damaged(self, what: str) -> ConversionError:
        return ConversionError(Problem(str(self._path), None, f"{what}: damaged, or no file to trust."))
