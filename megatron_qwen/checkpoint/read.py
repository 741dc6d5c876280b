"""Reads slices of a torch_dist checkpoint: no process group, no model, no GPU, whatever layout wrote it."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.errors import CheckpointError, Problem


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """A checkpoint as named global tensors.

    Args:
        directory: one iteration's directory.

    Raises:
        CheckpointError: the metadata is missing, damaged or refused.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata = read_metadata(directory)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the checkpoint, optimizer state included."""
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str, *, leading: tuple[int, ...] = ()) -> torch.Tensor:
        """A tensor, or the part of it at an index of its first dimensions.

        Args:
            name: such as ``decoder.layers.mlp.linear_fc2.weight``.
            leading: index of the layer, or of layer and expert; only chunks that touch it are read.

        Returns:
            A tensor on the CPU without the leading dimensions.
        """
        entry = self._entry(name)
        axes = len(leading)
        result = torch.empty(tuple(entry.size)[axes:], dtype=entry.properties.dtype)
        filled = 0
        for index, chunk in enumerate(entry.chunks):
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = [place - start for place, start in zip(leading, offsets, strict=False)]
            if any(not 0 <= place < size for place, size in zip(inside, sizes, strict=False)):
                continue
            part = self._chunk(name, index, offsets, sizes)[tuple(inside)]
            box = tuple(slice(start, start + size) for start, size in zip(offsets[axes:], sizes[axes:], strict=True))
            result[box] = part
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(
                Problem(
                    str(self.directory), name, f"holds {filled} of {result.numel()} values at {leading}: incomplete."
                )
            )
        return result

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(Problem(str(self.directory), name, "there is no such tensor in the checkpoint."))
        return entry

    def _chunk(self, name: str, index: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        stored = self._metadata.storage_data[MetadataIndex(name, torch.Size(offsets), index)]
        path = self.directory / str(stored.relative_path)
        try:
            with path.open("rb") as file:
                file.seek(stored.offset)
                data = file.read(stored.length)
            tensor: torch.Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(Problem(str(path), name, f"cannot be read ({type(error).__name__}).")) from None
        return tensor.view(sizes)
