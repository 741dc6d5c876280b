"""Named tensors that are read a few rows at a time, whatever holds them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import xxhash

from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.checkpoint.weights import ModelWeights
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.hf.mapping import CoreTensor, HfTensor, Range, core_tensors, hf_tensors

_BLOCK_BYTES = 1 << 24


class TensorSet(Protocol):
    """A model's weights under their Hugging Face names."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, [stop - start, ...]."""


class ExportedWeights:
    """A checkpoint's weights as an export names and cuts them.

    Args:
        weights: of the checkpoint.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        self._items = {item.name: item for item in hf_tensors(weights.model)}
        self.tensors = {
            name: TensorInfo(item.shape, weights.dtype(item.mapping.core)) for name, item in self._items.items()
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a Hugging Face tensor, read from the checkpoint's tensors that hold them."""
        item = self._items[name]
        parts = [self.core_rows(item, low, high) for low, high in _cut(item.rows, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def core_rows(self, item: HfTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of the checkpoint's tensor behind a Hugging Face one."""
        return self.weights.rows(CoreTensor(item.mapping, item.leading, ()), start, stop)


class ImportedWeights:
    """The weights of a Hugging Face directory as a checkpoint names and cuts them.

    Args:
        source: the directory's tensors.
        model: their shape.
    """

    def __init__(self, source: TensorSet, model: ModelConfig) -> None:
        self._source = source
        self._items = {(item.mapping.core, item.leading): item for item in core_tensors(model)}

    def rows(self, item: CoreTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a checkpoint's tensor, read from the Hugging Face tensors that hold them."""
        found, at = [], 0
        known = self._items[item.mapping.core, item.leading]
        for part, (first, last) in known.mapping.origin():
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                found.append(self._source.rows(known.names[part], first + low - at, first + high - at))
            at += last - first
        return found[0] if len(found) == 1 else torch.cat(found)


def _cut(ranges: tuple[Range, ...], start: int, stop: int) -> Iterator[Range]:
    """The part of consecutive ranges that lies between two places in their sequence."""
    at = 0
    for first, last in ranges:
        low, high = max(start, at), min(stop, at + last - first)
        if low < high:
            yield first + low - at, first + high - at
        at += last - first


def blocks(sources: Sequence[TensorSet], name: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """A tensor from top to bottom, the same rows of every source, of each about 16 MiB at most."""
    infos = [source.tensors[name] for source in sources]
    rows = infos[0].shape[0]
    width = max(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos) // max(1, rows)
    step = max(1, _BLOCK_BYTES // max(1, width))
    for start in range(0, rows, step):
        yield tuple(source.rows(name, start, min(rows, start + step)) for source in sources)


def digest(source: TensorSet, name: str) -> str:
    """xxh3-128 of a tensor's values."""
    found = xxhash.xxh3_128()
    for (block,) in blocks([source], name):
        found.update(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))
    return found.hexdigest()
