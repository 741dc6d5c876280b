"""Tensors of safetensors files by the name they are stored under, read by rows or by columns."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from checkpoints_convert.safetensors_format import StoredEntry
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.errors import ConversionError, Problem


class StoredTensors:
    """Tensors as they are in their files.

    Args:
        entries: dtype, shape and place by name.
        files: the file that holds each.
    """

    def __init__(self, entries: Mapping[str, StoredEntry], files: Mapping[str, Path]) -> None:
        self.entries, self.files = entries, files

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype by name."""
        return {name: TensorInfo(entry.shape, entry.dtype) for name, entry in self.entries.items()}

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor."""
        entry = self.entries[name]
        return self._read(name, 0, entry.size).view(entry.dtype).view(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows, [stop - start, ...]."""
        entry = self.entries[name]
        width = torch.Size(entry.shape[1:]).numel() * entry.dtype.itemsize
        data = self._read(name, start * width, (stop - start) * width)
        return data.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns of a tensor of two dimensions, [rows, stop - start]; no more than these are in memory."""
        entry = self.entries[name]
        height, width = entry.shape
        if (start, stop) == (0, width):
            return self.whole(name)
        item = entry.dtype.itemsize
        values = torch.empty((height, stop - start), dtype=entry.dtype)
        view, length = memoryview(values.view(-1).view(torch.uint8).numpy()), (stop - start) * item
        with self.files[name].open("rb", buffering=0) as file:
            for row in range(height):
                self._fill(
                    file.fileno(), name, entry.offset + (row * width + start) * item, view[row * length :][:length]
                )
        return values

    def _read(self, name: str, first: int, size: int) -> torch.Tensor:
        values = torch.empty(size, dtype=torch.uint8)
        with self.files[name].open("rb", buffering=0) as file:
            self._fill(file.fileno(), name, self.entries[name].offset + first, memoryview(values.numpy()))
        return values

    def _fill(self, descriptor: int, name: str, at: int, view: memoryview) -> None:
        while len(view):
            taken = os.preadv(descriptor, [view], at)
            if not taken:
                raise ConversionError(Problem(str(self.files[name]), name, "is truncated."))
            at, view = at + taken, view[taken:]
