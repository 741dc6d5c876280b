"""A linear layer on a grid of few values: codes, scales and zeros, before a format packs them."""

from dataclasses import dataclass

import torch

# A scale of 0 would make a group of zeros impossible to divide by; the smallest normal float16 is 6.1e-5.
_SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class QuantizedLinear:
    """The weight of a linear layer as integers.

    Args:
        codes: uint8 [out, in], from 0 to 2^bits - 1.
        scales: float32 [out, groups], values that the format's own dtype holds.
        zeros: uint8 [out, groups], the code that means 0.
        group_of: int32 [in], the group of every column; None where groups are consecutive columns of one length.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """The weight that the integers stand for, float32 [out, in]."""
        columns, groups = self.codes.shape[1], self.scales.shape[1]
        if self.group_of is None:
            group = torch.arange(columns) // (columns // groups)
        else:
            group = self.group_of.long()
        return (self.codes.float() - self.zeros.float()[:, group]) * self.scales[:, group]


@dataclass(frozen=True)
class Grid:
    """Which values a format can hold.

    Args:
        bits: of a code, 4 or 8.
        group: columns that share a scale; None: a whole row.
        symmetric: whether zero is the middle code, 2^(bits - 1).
        scale_dtype: in which the format stores scales.
    """

    bits: int
    group: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def largest_code(self) -> int:
        """2^bits - 1."""
        return (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1 if self.group is None else columns // self.group

    def fit(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros by the largest and smallest value of every group.

        Args:
            values: [out, in]; ``in`` a multiple of ``group``.

        Returns:
            Scales float32 [out, groups], rounded to ``scale_dtype``, and zeros uint8 [out, groups].
        """
        grouped = values.float().unflatten(1, (self.groups(values.shape[1]), -1))
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        if self.symmetric:
            scales = torch.maximum(-low, high) * 2 / self.largest_code
        else:
            scales = (high - low) / self.largest_code
        scales = scales.clamp(min=_SMALLEST_SCALE).to(self.scale_dtype).float()
        if self.symmetric:
            zeros = torch.full_like(scales, 1 << (self.bits - 1))
        else:
            zeros = (-low / scales).round().clamp(0, self.largest_code)
        return scales, zeros.to(torch.uint8)

    def round(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The nearest codes, uint8 [out, in], of values [out, in]."""
        grouped = values.float().unflatten(1, (scales.shape[1], -1))
        codes = (grouped / scales[:, :, None]).round() + zeros[:, :, None].float()
        found: torch.Tensor = codes.clamp(0, self.largest_code).to(torch.uint8).flatten(1)
        return found

    def nearest(self, values: torch.Tensor) -> QuantizedLinear:
        """Round to nearest."""
        scales, zeros = self.fit(values)
        return QuantizedLinear(self.round(values, scales, zeros), scales, zeros)
