"""The safetensors format: headers as the safetensors library writes them, and headers read without trust.

Format: 8 bytes of header length (little endian), the header (JSON, padded with spaces to a multiple of 8), the values
in the order of the header. https://github.com/huggingface/safetensors
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.unexpected_file import what_it_is
from megatron_qwen.errors import Problem

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # the library's own limit
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# torch's names of the formats, without "torch.".
DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in _NAMES)
# The library puts wider formats first, and among those of one width the later in this list.
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


@dataclass(frozen=True)
class StoredEntry:
    """A tensor of a safetensors file.

    Args:
        name: its key.
        dtype: its format.
        shape: its shape.
        offset: first byte of its values in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_file_order[Item](items: Sequence[Item], *, key: Any) -> list[Item]:
    """Tensors in the order in which the library lays them out; ``key`` gives (dtype, name) of an item."""

    def place(item: Item) -> tuple[int, str]:
        dtype, name = key(item)
        return -_ORDER.index(_NAMES[dtype]), name

    return sorted(items, key=place)


def header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Everything in front of the values, for tensors in the order of ``in_file_order``."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def read_header(path: Path) -> tuple[list[StoredEntry], list[Problem]]:
    """The tensors of a file, and what is wrong with it; the values are not read."""
    problems: list[Problem] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else -1
        if not 2 <= length <= min(_LARGEST_HEADER, size - _LENGTH.size):
            fix = what_it_is(path) or "is no safetensors file, or is cut off."
            return [], [Problem(str(path), f"{size:,} bytes", fix)]
        text = file.read(length)
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                repeated.append(key)
            found[key] = value
        return found

    try:
        content = json.loads(text, object_pairs_hook=once)
        if not isinstance(content, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        return [], [Problem(str(path), None, "has a header that cannot be read: damaged.")]
    problems += [Problem(str(path), key, "stands twice in the header.") for key in repeated[:10]]
    content.pop("__metadata__", None)
    entries = []
    for name, described in content.items():
        try:
            entries.append(_entry(name, described, _LENGTH.size + length))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(Problem(str(path), name, f"is described wrongly in the header ({error})."))
    if not problems:
        problems += _layout_problems(path, entries, begin=_LENGTH.size + length, size=size)
    return entries, problems


def _entry(name: str, described: dict[str, Any], begin: int) -> StoredEntry:
    dtype = _DTYPES.get(described["dtype"])
    if dtype is None:
        raise ValueError(f"format {described['dtype']!r} is not known here")
    shape = tuple(described["shape"])
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape):  # JSON's true is an int in Python
        raise ValueError(f"shape {described['shape']!r}")
    first, last = described["data_offsets"]
    if not (type(first) is int and type(last) is int):
        raise ValueError("data_offsets must be whole numbers")
    entry = StoredEntry(name, dtype, shape, begin + int(first))
    if first < 0 or last - first != entry.size:
        raise ValueError(f"{last - first} bytes do not hold {list(shape)} of {described['dtype']}")
    return entry


def _layout_problems(path: Path, entries: list[StoredEntry], *, begin: int, size: int) -> list[Problem]:
    at = begin
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != at:
            return [Problem(str(path), entry.name, "overlaps another tensor, or leaves a gap before it: damaged.")]
        at += entry.size
    if at != size:
        return [Problem(str(path), f"{size} bytes", f"should have {at} bytes by its header: cut off or changed.")]
    return []
