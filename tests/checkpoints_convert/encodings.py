"""Encodings for tests, one of each kind that quantized formats have, and weights whose rows are in several places."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import pad

from checkpoints_convert.encoding import SAME_NAME, EncodedTensor
from checkpoints_convert.output import RowSpan, read_rows


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-127, 127).to(torch.int8)


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    # Rows of zeros get a scale, too.
    return (largest / 127).clamp(min=1e-10)


@dataclass(frozen=True)
class Int8Rows:
    """int8 with a scale per row, and the shape beside them, as compressed-tensors has it."""

    block_rows: int = 1
    working_dtype: torch.dtype = torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        return {
            SAME_NAME: EncodedTensor(shape, torch.int8),
            "weight_scale": EncodedTensor((shape[0], 1), torch.float32),
            "weight_shape": EncodedTensor((len(shape),), torch.int64, lambda: torch.tensor(shape)),
        }

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        values = rows.float()
        scale = scale_of(values.abs().amax(dim=1, keepdim=True))
        return {SAME_NAME: rounded(values, scale), "weight_scale": scale}


@dataclass(frozen=True)
class Int8Blocks:
    """int8 with a scale for a square of values, as fine-grained FP8 has it; the last squares may be smaller."""

    block_rows: int = 4
    working_dtype: torch.dtype = torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        squares = (-(-shape[0] // self.block_rows), -(-shape[1] // self.block_rows))
        return {SAME_NAME: EncodedTensor(shape, torch.int8), "weight_scale_inv": EncodedTensor(squares, torch.float32)}

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        (height, width), side = rows.shape, self.block_rows
        squares = pad(rows.float(), (0, -width % side, 0, -height % side)).unflatten(1, (-1, side))
        squares = squares.unflatten(0, (-1, side))  # [row of squares, side, column of squares, side]
        scale = scale_of(squares.abs().amax(dim=(1, 3), keepdim=True))
        values = rounded(squares, scale).flatten(2, 3).flatten(0, 1)[:height, :width]
        return {SAME_NAME: values, "weight_scale_inv": scale[:, 0, :, 0]}


@dataclass(frozen=True)
class PackedColumns:
    """Four int8 of one row of the weight to a word, words of the first columns first, as GPTQ has them."""

    block_rows: None = None
    working_dtype: torch.dtype = torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        rows, columns = shape
        return {
            "qweight": EncodedTensor((columns // 4, rows), torch.int32),
            "scales": EncodedTensor((1, rows), torch.float16),
            "g_idx": EncodedTensor((columns,), torch.int32, lambda: torch.zeros(columns, dtype=torch.int32)),
        }

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        scale = scale_of(rows.float().abs().amax(dim=1, keepdim=True))
        words = rounded(rows.float(), scale).view(torch.int32)  # [rows, columns / 4]
        return {"qweight": words.T, "scales": scale.T.half()}


@dataclass(frozen=True)
class Int8Tensor:
    """int8 with one scale, which needs a pass over all rows before the first is encoded; made for one weight."""

    spans: Sequence[RowSpan]
    block_rows: int = 1
    working_dtype: torch.dtype = torch.float32

    @cached_property
    def scale(self) -> torch.Tensor:
        rows = range(sum(span.rows for span in self.spans))
        return scale_of(torch.stack([read_rows(self.spans, row, row + 1).abs().max() for row in rows]).max().float())

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        scale = EncodedTensor((), torch.float32, lambda: self.scale)
        return {SAME_NAME: EncodedTensor(shape, torch.int8), "weight_scale": scale}

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        return {SAME_NAME: rounded(rows.float(), self.scale)}


@dataclass
class Scattered:
    """A weight whose rows are in several places.

    Args:
        values: the whole weight.
        parts: rows of each place.
        watch: called with first and last row before rows are read.
        reads: the rows that were read, in order.
    """

    values: torch.Tensor
    parts: tuple[int, ...]
    watch: Callable[[], None] = lambda: None
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def spans(self) -> list[RowSpan]:
        borders = pairwise(accumulate(self.parts, initial=0))
        return [self._span(first, last) for first, last in borders]

    def _span(self, first: int, last: int) -> RowSpan:
        def read(start: int, stop: int) -> torch.Tensor:
            assert 0 <= start < stop <= last - first
            self.watch()
            self.reads.append((first + start, first + stop))
            return self.values[first + start : first + stop]

        return RowSpan(last - first, read)
