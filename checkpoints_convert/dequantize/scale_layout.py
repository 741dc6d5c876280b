"""Which part of a weight a scale belongs to: all of it, a row, a group of a row's columns, or a block."""

from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.stored import StoredTensors


@dataclass(frozen=True)
class ScaleLayout:
    """Scales of a weight [out, in] that are stored row by row.

    Args:
        height: rows that share a scale; None: all.
        width: columns that share a scale; None: all.
    """

    height: int | None
    width: int | None

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale."""
        return self.height is None and self.width is None

    def shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """How the scales of a weight of some shape may be stored."""
        if self.per_tensor:
            return ((1,), (), (1, 1))
        return (self.grid(shape),)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Scales along rows and columns."""
        rows, columns = (
            1 if size is None else -(-length // size)
            for length, size in zip(shape, (self.height, self.width), strict=True)
        )
        return rows, columns

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Rows of the scales that rows of the weight need."""
        return (0, 1) if self.height is None else (start // self.height, -(-stop // self.height))

    def read(self, stored: StoredTensors, name: str, start: int, stop: int) -> torch.Tensor:
        """The stored scales of rows of the weight, float32, [rows of scales, columns of scales]."""
        if self.per_tensor:
            return stored.whole(name).float().reshape(1, 1)
        return stored.rows(name, *self.span(start, stop)).float()

    def spread(
        self, scales: torch.Tensor, start: int, stop: int, columns: int, *, group_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What ``read`` gave, broadcastable to [stop - start, columns].

        Args:
            scales: of the rows from ``start`` to ``stop``.
            start: first row.
            stop: row behind the last.
            columns: of the weight.
            group_of: int64 [columns], the column of the scales for every column; None where groups are consecutive.
        """
        # By index, not repeated: a block may be much larger than the weight.
        if self.height is not None and self.height > 1:
            scales = scales[torch.arange(start, stop) // self.height - self.span(start, stop)[0]]
        if group_of is None and self.width is not None:
            group_of = torch.arange(columns) // self.width
        return scales if group_of is None else scales[:, group_of]
