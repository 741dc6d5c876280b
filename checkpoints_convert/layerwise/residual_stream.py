"""What flows from layer to layer: hidden states of all sequences, in memory or in a file."""

import os
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from megatron_qwen.files import atomic_write, is_temporary, publish, sync, temporary_name

_BLOCK = 1 << 24


class ResidualStream(Protocol):
    """Hidden states in front of a layer, [length, h] a sequence."""

    def read(self, sequence: int) -> torch.Tensor:
        """[length, h] on the CPU."""

    def write(self, sequence: int, hidden: torch.Tensor) -> None:
        """Notes the states behind the layer; those in front of it stay until ``advance``."""

    def advance(self, layer: int) -> None:
        """Every sequence has been written: what follows reads the states in front of ``layer``."""


class StreamInMemory:
    """States in memory; those of a layer replace those before it one by one.

    Args:
        sequences: how many.
    """

    def __init__(self, sequences: int) -> None:
        self._states: list[torch.Tensor] = [torch.empty(0)] * sequences

    def read(self, sequence: int) -> torch.Tensor:
        """[length, h]."""
        return self._states[sequence]

    def write(self, sequence: int, hidden: torch.Tensor) -> None:
        """Replaces the states of a sequence, which nothing reads again in front of this layer."""
        self._states[sequence] = hidden.cpu()

    def advance(self, layer: int) -> None:
        """Nothing to do."""

    def discard(self) -> None:
        """Frees the states."""
        self._states.clear()


class StreamOnDisk:
    """States in a file a layer: ``stream-00007`` has those in front of layer 7.

    The files of two layers are there while a layer is computed. A file appears when it is complete, with its hash
    next to it, so a later start can use it.

    Args:
        directory: of the files.
        shape: [sequences, length, h].
        dtype: of the states.
    """

    def __init__(self, directory: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._directory, self._shape, self._dtype = directory, shape, dtype
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if is_temporary(path):  # of a start that was killed
                path.unlink()
        self._bytes = shape[1] * shape[2] * dtype.itemsize
        self._reading: int | None = None
        self._writing: tuple[Path, int] | None = None

    def resume(self, layer: int) -> bool:
        """Opens what an earlier start left in front of a layer; False where there is nothing, or it is damaged."""
        path = self._path(layer)
        try:
            intact = path.with_suffix(".xxh3").read_text() == _digest(path)
        except OSError:
            intact = False
        if intact:
            self._open(path)
        self._remove_others(keep=layer if intact else None)
        return intact

    def read(self, sequence: int) -> torch.Tensor:
        """[length, h]."""
        assert self._reading is not None
        values = torch.empty(self._shape[1:], dtype=self._dtype)
        view = memoryview(values.view(-1).view(torch.uint8).numpy())
        at = sequence * self._bytes
        while len(view):
            taken = os.preadv(self._reading, [view], at)
            assert taken > 0, "the file was complete when it was opened"
            view, at = view[taken:], at + taken
        return values

    def write(self, sequence: int, hidden: torch.Tensor) -> None:
        """Writes the states of a sequence behind the layer."""
        if self._writing is None:
            path = temporary_name(self._path(0))
            self._writing = path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        view = memoryview(hidden.to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8).numpy())
        at = sequence * self._bytes
        while len(view):
            taken = os.pwrite(self._writing[1], view, at)
            view, at = view[taken:], at + taken

    def advance(self, layer: int) -> None:
        """Publishes the file in front of ``layer``. The one before it stays until the next call: the solution of the
        layer between them may not be on the disk yet.
        """
        assert self._writing is not None
        temporary, descriptor = self._writing
        os.close(descriptor)
        self._writing = None
        sync(temporary)
        path = self._path(layer)
        atomic_write(path.with_suffix(".xxh3"), _digest(temporary))
        publish(temporary, path, durable=True)
        self._remove_others(keep=layer, also=layer - 1)
        self._open(path)

    def discard(self) -> None:
        """Removes the files."""
        if self._reading is not None:
            os.close(self._reading)
            self._reading = None
        self._remove_others(keep=None)

    def _open(self, path: Path) -> None:
        if self._reading is not None:
            os.close(self._reading)
        self._reading = os.open(path, os.O_RDONLY)

    def _path(self, layer: int) -> Path:
        return self._directory / f"stream-{layer:05d}.bin"

    def _remove_others(self, *, keep: int | None, also: int | None = None) -> None:
        kept = {self._path(layer).stem for layer in (keep, also) if layer is not None}
        for path in self._directory.glob("stream-*"):
            if path.stem not in kept:
                path.unlink()


def _digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
