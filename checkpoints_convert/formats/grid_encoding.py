"""Rounding to nearest as an encoding, for formats whose values are on a grid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from checkpoints_convert.encoding import EncodedTensor
from checkpoints_convert.formats.quantized_linear import Grid
from megatron_qwen.errors import ConversionError, Problem


class GridFormat(Protocol):
    """What rounding to nearest asks of a format."""

    @property
    def grid(self) -> Grid:
        """What its values can be."""

    def tensors(self, shape: tuple[int, ...]) -> Mapping[str, EncodedTensor]:
        """What is made of a weight of [out, in]."""

    def packed(
        self, codes: Callable[[], torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """The tensors of some rows that are made of rows, from codes that are computed when they are needed."""


@dataclass(frozen=True)
class GridEncoding:
    """Rounds every group of a row to nearest.

    Args:
        format: what packs the codes.
        block_rows: as of an ``Encoding``; None where the input dimension comes first in the file.
        side_rows: where it does: rows that are encoded alone. What they make are columns of the tensors of the whole
            weight, side by side along the last dimension.
    """

    format: GridFormat
    block_rows: int | None
    side_rows: int | None = None

    @property
    def working_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def tensors(self, shape: tuple[int, ...]) -> Mapping[str, EncodedTensor]:
        """Those of the format."""
        return self.format.tensors(shape)

    def encode(self, rows: torch.Tensor, *, name: str) -> Mapping[str, torch.Tensor]:
        """Rounds and packs rows [n, in].

        Raises:
            ConversionError: a value is not finite, or a scale beyond its format.
        """
        grid = self.format.grid
        values = rows.float()
        scales, zeros = grid.fit(values)
        if not scales.isfinite().all():
            raise ConversionError(Problem(name, None, "holds values that are not finite, or too large for a scale."))
        return self.format.packed(lambda: grid.round(values, scales, zeros), scales, zeros)
