"""The zip archive that torch.save writes for a tensor: the place of its values, and the bytes around them.

torch_dist shards hold one such zip archive per slice of a tensor. With the place of the raw values, any rows can
be read without the rest, and a shard can be written without holding a whole tensor in memory. The pickle inside is read
with an unpickler that knows tensors and nothing else.
"""

import collections
import io
import os
import pickle
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_qwen.checkpoint.metadata import FrozenCall

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LARGEST_PICKLE = 1 << 16  # torch.save describes a tensor in less than 200 bytes; a longer pickle is something else
_STORAGES: dict[str, torch.dtype] = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class NoPlainTensor(ValueError):
    """The bytes are not one contiguous tensor as torch.save writes it; the text says why."""


@dataclass(frozen=True)
class StoredTensor:
    """The place of a saved tensor's values.

    Args:
        offset: first byte of the values, from the beginning of the file.
        dtype: their format.
        shape: their shape, row-major.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Envelope:
    """What torch.save writes before and after the values of a tensor."""

    before: bytes
    after: bytes


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of a tensor; creates only tuples."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return FrozenCall(_describe)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise NoPlainTensor(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, _count = pid
        if kind != "storage":
            raise NoPlainTensor("it refers to no storage")
        return dtype, str(key)


def _describe(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> tuple[Any, ...]:
    return (*storage, offset, tuple(size), tuple(stride))


def locate(file: BinaryIO, offset: int, length: int) -> StoredTensor:
    """Finds the values of the tensor that is saved in a part of a file.

    Args:
        file: an open shard.
        offset: first byte of the archive.
        length: its bytes.

    Raises:
        NoPlainTensor: it is damaged, compressed, or holds anything but one contiguous tensor.
    """
    window = _Window(file, offset, length)
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            described = members["data.pkl"]
            if described.file_size > _LARGEST_PICKLE:
                raise NoPlainTensor("its description is too long")
            window.seek(_start(window, described))
            content = _TensorUnpickler(io.BytesIO(window.read(described.file_size) or b"")).load()
            dtype, key, start, shape, stride = content
            if not all(isinstance(number, int) for number in (start, *shape, *stride)) or not isinstance(
                dtype, torch.dtype
            ):
                raise NoPlainTensor("its description is none")
            values = members[f"data/{key}"]
            begin = _start(window, values) + start * dtype.itemsize
    except NoPlainTensor:
        raise
    except Exception as error:
        raise NoPlainTensor(f"it is damaged ({type(error).__name__})") from None
    if stride != _contiguous(shape):
        raise NoPlainTensor("it is not contiguous")
    count = 1
    for size in shape:
        count *= size
    if start < 0 or values.file_size < (start + count) * dtype.itemsize:
        raise NoPlainTensor("its values are cut off")
    return StoredTensor(offset + begin, dtype, shape)


def _start(window: _Window, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member begin."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise NoPlainTensor("it is compressed or encrypted")
    window.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size) or b"")
    if header[0] != b"PK\x03\x04":
        raise NoPlainTensor("it is damaged (local header)")
    return member.header_offset + _LOCAL_HEADER.size + int(header[-2]) + int(header[-1])


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> Envelope:
    """What torch.save would write around a tensor, its checksums left out.

    torch itself writes it, with the values skipped, so memory and disk hold no tensor of that size.
    """
    checked = torch.serialization.get_crc32_options()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive"
        torch.serialization.set_crc32_options(False)
        try:
            with torch.serialization.skip_data():
                torch.save(torch.empty(shape, dtype=dtype), path)
        finally:
            torch.serialization.set_crc32_options(checked)
        size = path.stat().st_size
        with path.open("rb") as file:
            stored = locate(file, 0, size)
            file.seek(0)
            before = file.read(stored.offset)
            file.seek(stored.offset + torch.Size(shape).numel() * dtype.itemsize)
            return Envelope(before, file.read())
