"""What a conversion writes: files of tensors, each tensor a choice of rows from wherever it is read.

A conversion first makes these plans, which decide every byte, and only then moves data. So what it needs is known
before it begins, and what an interrupted one left can be told from what it should have left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from megatron_qwen.errors import ConversionError, Problem

ReadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class RowSpan:
    """Rows of a tensor that come from one place.

    Args:
        rows: how many.
        read: gives rows start to stop of the row span, [stop - start, ...].
        row_bytes: bytes that are read for a row, where that is more than is written of it.
    """

    rows: int
    read: ReadRows
    row_bytes: int = 0


@dataclass(frozen=True)
class OutputTensor:
    """A tensor in a file.

    Args:
        name: of the tensor, as the reader of the file knows it.
        shape: its shape there.
        dtype: its format there.
        spans: where its rows come from, from top to bottom.
        before: bytes of the file format in front of the values.
        after: bytes of the file format behind them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[RowSpan, ...]
    before: bytes = b""
    after: bytes = b""

    @property
    def value_bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.before) + self.value_bytes + len(self.after)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a row span."""
        return self.value_bytes // max(1, sum(span.rows for span in self.spans))


@dataclass(frozen=True)
class OutputFile:
    """A file of tensors.

    Args:
        name: relative to the directory that is made.
        header: bytes in front of the first tensor.
        tensors: in order.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    def __post_init__(self) -> None:
        assert ".." not in Path(self.name).parts, self.name
        assert not Path(self.name).is_absolute(), self.name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(output.size for output in self.tensors)

    def tensor_offsets(self) -> list[int]:
        """Where each tensor begins."""
        starts = accumulate((output.size for output in self.tensors), initial=len(self.header))
        return [start for start, _ in pairwise(starts)]


def cast(block: torch.Tensor, output: OutputTensor) -> torch.Tensor:
    """A block in the tensor's format.

    Raises:
        ConversionError: a finite value would become infinite (float16 ends at 65,504).
    """
    converted = block.to(output.dtype)
    narrower = output.dtype == torch.float16 and block.dtype != torch.float16
    if narrower and not torch.equal(converted.isfinite(), block.isfinite()):
        raise ConversionError(Problem(output.name, "fp16", "holds values beyond 65,504; choose bf16 or fp32."))
    return converted


def pack[Item](items: Sequence[Item], sizes: Sequence[int], *, limit: int) -> list[list[Item]]:
    """Fills files one after the other, none above ``limit`` bytes unless a single item is.

    The rule is that of huggingface_hub: an item larger than the limit has a file of its own.
    """
    files: list[list[Item]] = []
    own: list[Item] = []
    size = 0
    for item, length in zip(items, sizes, strict=True):
        if length > limit:
            files.append([item])
            continue
        if own and size + length > limit:
            files.append(own)
            own, size = [], 0
        own.append(item)
        size += length
    return [*files, own] if own else files
