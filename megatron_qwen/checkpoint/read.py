"""Reads rows of the tensors of a torch_dist checkpoint of any layout, without process group, model or GPU.

torch's own loader fills whole tensors and needs all of them in memory. A converter streams: it needs rows of one tensor
at a time, of checkpoints larger than memory. So ``.metadata`` says which slice of a tensor lies at which bytes of which
file, ``torch_file.locate`` finds the values inside the zip archive of a slice, and only the wanted rows are read.

A weight may be stored with leading dimensions for layers and experts: ``decoder.layers.mlp.linear_fc2.weight`` with
shape [24, 896, 4864] holds 24 layers. ``leading=(3,)`` then selects layer 3, and rows count within [896, 4864].
"""

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_qwen.checkpoint.manifest import FileEntry
from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.checkpoint.torch_file import NoPlainTensor, StoredTensor, locate
from megatron_qwen.errors import CheckpointError, Problem

_VERIFY_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Chunk:
    """A stored slice (hyperrectangle) of a tensor.

    Args:
        tensor: name of the tensor.
        offsets: index of its first value, one number per dimension of the tensor.
        sizes: its shape.
        file: the shard that holds it, relative to the checkpoint.
        start: first byte of its zip archive in the file.
        length: bytes of its zip archive.
    """

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class CheckpointReader:
    """A checkpoint as named global tensors. Safe to use from several threads.

    Args:
        directory: one iteration's directory.
        manifest: entries of the checkpoint's manifest; a slice that has a hash there is verified at its first read.

    Raises:
        CheckpointError: the metadata is missing, damaged or refused.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, FileEntry] | None = None) -> None:
        self.directory = directory
        self._metadata = read_metadata(directory)
        self._noted = {
            (name, start): (length, digest)
            for name, entry in (manifest or {}).items()
            for start, length, digest in entry.spans()
        }
        self._lock = threading.Lock()
        self._located: dict[Chunk, StoredTensor] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._by_leading: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the checkpoint, optimizer state included."""
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str, *, leading: tuple[int, ...] = ()) -> torch.Tensor:
        """The tensor, or its part at an index of its leading dimensions.

        Args:
            name: such as ``decoder.layers.mlp.linear_fc2.weight``.
            leading: index of the layer, or of layer and expert; only chunks that contain it are read.

        Returns:
            A tensor on the CPU without the leading dimensions.
        """
        shape = tuple(self._entry(name).size)[len(leading) :]
        return self.read_rows(name, 0, shape[0] if shape else 1, leading=leading)

    def read_rows(self, name: str, start: int, stop: int, *, leading: tuple[int, ...] = ()) -> torch.Tensor:
        """Rows start .. stop - 1 of a tensor, or of its part at a leading index: [stop - start, ...].

        Raises:
            CheckpointError: rows are missing or damaged; the message names file and tensor.
        """
        entry = self._entry(name)
        axes = len(leading)
        shape = tuple(entry.size)[axes:]
        result = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=entry.properties.dtype)
        filled = 0
        for chunk in self.chunks(name, leading):
            offsets, sizes = chunk.offsets[axes:], chunk.sizes[axes:]
            if not shape:
                result, filled = self._rows(chunk, leading, 0, 1).view(()), 1
                continue
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low >= high:
                continue
            part = self._rows(chunk, leading, low - offsets[0], high - offsets[0])
            columns = (slice(begin, begin + size) for begin, size in zip(offsets[1:], sizes[1:], strict=True))
            box = (slice(low - start, high - start), *columns)
            if len(result) == high - low and result.shape == part.shape:
                result = part
            else:
                result[box] = part
            filled += part.numel()
        if filled != result.numel():
            fix = f"has {filled} of {result.numel()} values in rows {start} to {stop} at {leading}: incomplete."
            raise CheckpointError(Problem(str(self.directory), name, fix))
        return result

    def chunks(self, name: str, leading: tuple[int, ...] = ()) -> list[Chunk]:
        """The stored slices that contain an index of a tensor's leading dimensions."""
        key = (name, len(leading))
        with self._lock:
            if key not in self._by_leading:
                found: dict[tuple[int, ...], list[Chunk]] = {}
                for chunk in self._all_chunks(name):
                    axes = [
                        range(at, at + size)
                        for at, size in zip(chunk.offsets[: key[1]], chunk.sizes[: key[1]], strict=True)
                    ]
                    for place in itertools.product(*axes):
                        found.setdefault(place, []).append(chunk)
                self._by_leading[key] = found
            return self._by_leading[key].get(leading, [])

    def problems(self, name: str) -> list[Problem]:
        """Problems of the metadata of a tensor: slices outside of it, overlapping or missing. Reads no values."""
        entry, where = self._entry(name), str(self.directory)
        try:
            with self._lock:
                chunks = self._all_chunks(name)
        except CheckpointError as error:
            return list(error.problems)
        found, size = [], tuple(entry.size)
        for chunk in chunks:
            ends = [at + length for at, length in zip(chunk.offsets, chunk.sizes, strict=True)]
            if (
                len(chunk.sizes) != len(size)
                or min(chunk.offsets, default=0) < 0
                or any(end > limit for end, limit in zip(ends, size, strict=False))
            ):
                found.append(Problem(where, name, f"has a slice at {chunk.offsets} that is outside of it."))
        if not found and (pair := _overlapping(chunks)):
            fix = f"has slices at {pair[0].offsets} and {pair[1].offsets} that overlap."
            found.append(Problem(where, name, fix))
        stored = sum(torch.Size(chunk.sizes).numel() for chunk in chunks)
        if stored != torch.Size(size).numel():
            found.append(Problem(where, name, f"holds {stored} of {torch.Size(size).numel()} values: incomplete."))
        return found

    def _all_chunks(self, name: str) -> list[Chunk]:
        if name not in self._chunks:
            self._chunks[name] = [
                self._chunk(name, index, tuple(chunk.offsets), tuple(chunk.sizes))
                for index, chunk in enumerate(self._entry(name).chunks)
            ]
        return self._chunks[name]

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(Problem(str(self.directory), name, "does not exist in the checkpoint."))
        return entry

    def _chunk(self, name: str, index: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
        try:
            stored = self._metadata.storage_data[MetadataIndex(name, torch.Size(offsets), index)]
            file = str(stored.relative_path)
            start, length = int(stored.offset), int(stored.length)
        except (KeyError, AttributeError, TypeError, ValueError):
            fix = f"has a slice at {offsets} that is stored nowhere: the metadata is damaged."
            raise CheckpointError(Problem(str(self.directory), name, fix)) from None
        if Path(file).name != file or "\0" in file or (self.directory / file).is_symlink():
            fix = f"has its values in {file!r}, outside of the checkpoint. Do not load this checkpoint."
            raise CheckpointError(Problem(str(self.directory), name, fix))
        return Chunk(name, offsets, sizes, file, start, length)

    def _rows(self, chunk: Chunk, leading: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        """Rows low .. high - 1 of a chunk at a leading index, read with one seek.

        A chunk is stored in row-major order. So rows that are consecutive, at one leading index, are consecutive bytes
        of the file: ``index`` is the number of leading slices before them, ``first`` the number of values.
        """
        stored = self._locate(chunk)
        axes = len(leading)
        sizes = chunk.sizes[axes:]
        width = torch.Size(sizes[1:]).numel()
        index = 0
        for place, offset, size in zip(leading, chunk.offsets, chunk.sizes, strict=False):
            index = index * size + place - offset
        first = (index * (sizes[0] if sizes else 1) + low) * width
        values = torch.empty((high - low, *sizes[1:]), dtype=stored.dtype)
        path = self.directory / chunk.file
        with path.open("rb", buffering=0) as file:
            file.seek(stored.offset + first * stored.dtype.itemsize)
            view = memoryview(values.view(-1).view(torch.uint8).numpy())
            while len(view):
                taken = file.readinto(view)
                if not taken:
                    raise CheckpointError(Problem(str(path), chunk.tensor, "is cut off."))
                view = view[taken:]
        return values

    def _locate(self, chunk: Chunk) -> StoredTensor:
        with self._lock:
            known = self._located.get(chunk)
        if known is not None:
            return known
        path = self.directory / chunk.file
        if damage := self._damage(chunk):
            raise CheckpointError(Problem(str(path), chunk.tensor, damage))
        try:
            with path.open("rb") as file:
                stored = locate(file, chunk.start, chunk.length)
        except FileNotFoundError:
            raise CheckpointError(Problem(str(path), None, "is missing.")) from None
        except NoPlainTensor as error:
            raise CheckpointError(Problem(str(path), chunk.tensor, f"cannot be read: {error}.")) from None
        dtype = self._entry(chunk.tensor).properties.dtype
        if stored.dtype != dtype or torch.Size(stored.shape).numel() != torch.Size(chunk.sizes).numel():
            fix = f"has {stored.dtype} {stored.shape}, but the metadata says {dtype} {chunk.sizes}: damaged."
            raise CheckpointError(Problem(str(path), chunk.tensor, fix))
        with self._lock:
            self._located[chunk] = stored
        return stored

    def _damage(self, chunk: Chunk) -> str | None:
        """Compares the bytes of a slice with its hash in the manifest, if there is one. None: no damage found."""
        noted = self._noted.get((chunk.file, chunk.start))
        if noted is None or noted[0] != chunk.length:
            return None
        digest, left = xxhash.xxh3_128(), chunk.length
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, max(left, 1))))
        with (self.directory / chunk.file).open("rb", buffering=0) as file:
            file.seek(chunk.start)
            while left:
                taken = file.readinto(buffer[: min(left, len(buffer))])
                if not taken:
                    return "is cut off."
                digest.update(buffer[:taken])
                left -= taken
        return (
            None
            if digest.hexdigest() == noted[1]
            else "does not match its checksum in the manifest: the file is damaged."
        )


def _overlapping(chunks: list[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two slices that share a value, or None.

    Comparing every pair would be quadratic in the number of chunks. So slices are grouped by their index in the
    dimensions along which all have length one (layers, experts), sorted within a group, and compared only with the
    following slices that begin before they end.
    """
    if not chunks:
        return None
    axes = range(len(chunks[0].sizes))
    single = [axis for axis in axes if all(chunk.sizes[axis] == 1 for chunk in chunks)]
    others = [axis for axis in axes if axis not in single]
    groups: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(tuple(chunk.offsets[axis] for axis in single), []).append(chunk)
    for group in groups.values():
        if not others and len(group) > 1:
            return group[0], group[1]
        group.sort(key=lambda chunk: [chunk.offsets[axis] for axis in others])
        for index, chunk in enumerate(group):
            for later in group[index + 1 :]:
                first = others[0]
                if later.offsets[first] >= chunk.offsets[first] + chunk.sizes[first]:
                    break
                if all(
                    later.offsets[axis] < chunk.offsets[axis] + chunk.sizes[axis]
                    and chunk.offsets[axis] < later.offsets[axis] + later.sizes[axis]
                    for axis in others
                ):
                    return chunk, later
    return None
