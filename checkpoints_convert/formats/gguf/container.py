"""The bytes of a GGUF file in front of its values: keys, and where each tensor begins.

Format, version 3, little endian (llama.cpp, ggml/include/gguf.h): magic, version, number of tensors, number of keys;
every key with its type; every tensor with name, dimensions from the innermost, type and offset; zeros up to a multiple
of 32. Every tensor begins at a multiple of 32 behind that.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from checkpoints_convert.formats.gguf.types import GgmlType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32


class ValueType(IntEnum):
    """Type of a key's value, by its number in a file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct's letters of the types with a fixed size.
FIXED = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Value:
    """The value of a key.

    Args:
        type: of the value, or of the elements of an array.
        content: number, truth value or text; a sequence of them is an array.
    """

    type: ValueType
    content: Any

    def encoded(self) -> bytes:
        """Type and value, as a file has them behind the key."""
        if isinstance(self.content, list | tuple):
            head = struct.pack("<IIQ", ValueType.ARRAY, self.type, len(self.content))
            if self.type == ValueType.STRING:
                return head + b"".join(_text(item) for item in self.content)
            return head + struct.pack(f"<{len(self.content)}{FIXED[self.type]}", *self.content)
        head = struct.pack("<I", self.type)
        if self.type == ValueType.STRING:
            return head + _text(self.content)
        return head + struct.pack(f"<{FIXED[self.type]}", self.content)


def uint32(value: int) -> Value:
    """A whole number, the type that llama.cpp asks for in most keys."""
    return Value(ValueType.UINT32, value)


def float32(value: float) -> Value:
    """A number."""
    return Value(ValueType.FLOAT32, value)


def text(value: str) -> Value:
    """A text."""
    return Value(ValueType.STRING, value)


@dataclass(frozen=True)
class Placed:
    """A tensor of a file.

    Args:
        name: of the tensor.
        shape: from the outermost dimension.
        type: of its values.
        size: bytes of its values.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    size: int


def header(keys: Mapping[str, Value], tensors: Sequence[Placed]) -> bytes:
    """Everything in front of the values of tensors that follow one another, each padded by ``padding``."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for name, value in keys.items():
        parts += [_text(name), value.encoded()]
    at = 0
    for tensor in tensors:
        parts.append(_text(tensor.name))
        dimensions = tensor.shape[::-1]
        parts.append(struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, tensor.type, at))
        at += tensor.size + len(padding(tensor.size))
    found = b"".join(parts)
    return found + padding(len(found))


def padding(size: int) -> bytes:
    """Zeros up to a multiple of ``ALIGNMENT``."""
    return bytes(-size % ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
