"""What a conversion writes: files of tensors, each made of a choice of rows from wherever they are read.

A conversion first makes these plans, which decide every byte, and only then moves data. So what it needs is known
before it begins, and what an interrupted one left can be told from what it should have left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from checkpoints_convert import safetensors_format
from checkpoints_convert.encoding import SAME_NAME, Cast, EncodedTensor, Encoding
from megatron_qwen.hf.mapping import Range

ReadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class RowSpan:
    """Rows of a tensor that come from one place.

    Args:
        rows: how many.
        read: gives rows start to stop of the row span, [stop - start, ...].
        row_bytes: bytes that a row takes while it is read and encoded, where that is more than is written of it.
    """

    rows: int
    read: ReadRows
    row_bytes: int = 0


@dataclass(frozen=True)
class OutputTensor:
    """A tensor in a file: one part of an encoding of rows.

    Args:
        name: of the tensor, as the reader of the file knows it.
        shape: its shape there.
        dtype: its format there.
        spans: where the rows that it is made of come from, from top to bottom.
        encoding: what makes it of them.
        part: which of the encoding's tensors it is.
        before: bytes of the file format in front of the values.
        after: bytes of the file format behind them.
        held_bytes: memory that one read of its rows takes where those come from a whole that is made first, beside the
            blocks that this is made of; 0 where rows are read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[RowSpan, ...]
    encoding: Encoding
    part: str = SAME_NAME
    before: bytes = b""
    after: bytes = b""
    held_bytes: int = 0

    @property
    def value_bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.before) + self.value_bytes + len(self.after)

    @property
    def rows(self) -> int:
        """Rows that it is made of."""
        return sum(span.rows for span in self.spans)

    @property
    def row_bytes(self) -> int:
        """Bytes that one of these rows takes in memory."""
        return max([self.value_bytes // max(1, self.rows), *(span.row_bytes for span in self.spans)])

    @property
    def unit_rows(self) -> int:
        """Rows that have to be encoded together."""
        return max(1, self.encoding.block_rows or self.rows)

    @property
    def unit_bytes(self) -> int:
        """Bytes that these rows take in memory, once."""
        return min(self.unit_rows, self.rows) * self.row_bytes

    def blocks(self, limit: int) -> list[Range]:
        """The rows that are read, encoded and written at once, from top to bottom.

        A block has a multiple of ``unit_rows`` (the last one has what is left) and at most ``limit`` bytes, unless one
        unit is larger. It ends with a span where a unit does, so that rows are joined, which copies them, only where
        the encoding needs rows of several spans together.
        """
        unit = self.unit_rows
        step = unit * max(1, limit // max(1, unit * self.row_bytes))
        ends = accumulate((span.rows for span in self.spans), initial=0)
        borders = sorted({0, self.rows, *(end for end in ends if end % unit == 0)})
        return [
            (start, min(last, start + step)) for first, last in pairwise(borders) for start in range(first, last, step)
        ]

    def values(self, start: int, stop: int) -> torch.Tensor:
        """What the rows of a block make of it.

        Raises:
            ConversionError: its format cannot hold them.
        """
        made = self.encoding.encode(read_rows(self.spans, start, stop), name=self.name)[self.part]
        assert made.dtype == self.dtype, f"{self.name}: {made.dtype} where the header says {self.dtype}"
        return made


def read_rows(spans: Sequence[RowSpan], start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor that is glued from spans, [stop - start, ...]."""
    found, at = [], 0
    for span in spans:
        low, high = max(start, at), min(stop, at + span.rows)
        if low < high:
            found.append(span.read(low - at, high - at))
        at += span.rows
    return found[0] if len(found) == 1 else torch.cat(found)


def encoded_tensors(
    name: str, shape: tuple[int, ...], spans: Sequence[RowSpan], encoding: Encoding
) -> list[OutputTensor]:
    """What a file holds of a weight.

    Every tensor reads the rows for itself, because a file has them at different places: safetensors puts wider formats
    first, so the scales of all weights precede the values.

    Args:
        name: of the weight. A part of the encoding takes the place of its last component: ``q_proj.weight`` becomes
            ``q_proj.weight_scale``.
        shape: of the weight, [rows, ...].
        spans: where its rows come from, from top to bottom.
        encoding: how it is written.
    """
    row_bytes = torch.Size(shape[1:]).numel() * encoding.working_dtype.itemsize
    spans = tuple(replace(span, row_bytes=max(span.row_bytes, row_bytes)) for span in spans)
    module = name.rpartition(".")[0]
    return [
        _encoded(name if part == SAME_NAME else f"{module}.{part}", made, spans, encoding, part)
        for part, made in encoding.tensors(shape).items()
    ]


def _encoded(name: str, made: EncodedTensor, spans: tuple[RowSpan, ...], encoding: Encoding, part: str) -> OutputTensor:
    if (value := made.value) is None:
        return OutputTensor(name, made.shape, made.dtype, spans, encoding, part)
    # Read as one row, and so written at once: it has a few bytes.
    whole = RowSpan(1, lambda start, stop: value()[None])
    return OutputTensor(name, made.shape, made.dtype, (whole,), Cast(made.dtype))


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


def safetensors_file(name: str, outputs: Sequence[OutputTensor]) -> OutputFile:
    """A safetensors file of some tensors, in the order of the format."""
    ordered = safetensors_format.in_file_order(outputs, key=lambda output: (output.dtype, output.name))
    header = safetensors_format.header([(output.name, output.dtype, output.shape) for output in ordered])
    return OutputFile(name, header, tuple(ordered))


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
