"""Rows of a quantized weight: their values, the grid they are on, and what else that grid could have held."""

from dataclasses import dataclass
from typing import Protocol

import torch

_LARGEST_E4M3 = 448.0
# e4m3: 3 bits behind the point, and 2^-6 is the smallest value with its own exponent.
_E4M3_FRACTION_BITS, _E4M3_LOWEST_EXPONENT = 3, -6


class QuantizedRows(Protocol):
    """Rows of a quantized weight, [n, in]."""

    @property
    def scales(self) -> torch.Tensor:
        """Float32, broadcastable to [n, in]; of columns that share a scale, all rows say so."""

    def values(self) -> torch.Tensor:
        """What they stand for, float32 [n, in]."""

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """The values of this grid (these scales and zeros) that are nearest to weights, float32 [n, in]."""

    def step(self) -> torch.Tensor:
        """Distance of neighbouring values of the grid, float32, broadcastable to [n, in]."""

    def inside(self) -> torch.Tensor:
        """Which values are not at an end of the grid, where larger weights were cut; bool [n, in]."""


@dataclass(frozen=True)
class IntegerRows:
    """Integer codes with scales and zeros: (code - zero) x scale.

    Args:
        codes: [n, in], integers of any dtype.
        scales: float32, broadcastable to [n, in].
        zeros: the code that means 0, float32, broadcastable to [n, in].
        low: least code.
        high: largest code.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    low: int
    high: int

    def values(self) -> torch.Tensor:
        """What they stand for, float32 [n, in]."""
        return (self.codes.float() - self.zeros) * self.scales

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid, float32 [n, in]."""
        codes = ((weights / self.scales).round() + self.zeros).clamp(self.low, self.high)
        return (codes - self.zeros) * self.scales

    def step(self) -> torch.Tensor:
        """The scales."""
        return self.scales

    def inside(self) -> torch.Tensor:
        """Codes that are neither the least nor the largest."""
        found: torch.Tensor = (self.codes != self.low) & (self.codes != self.high)
        return found


@dataclass(frozen=True)
class Fp8Rows:
    """float8_e4m3fn codes with scales.

    Args:
        codes: float8_e4m3fn [n, in].
        scales: float32, broadcastable to [n, in].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """What they stand for, float32 [n, in]."""
        return self.codes.float() * self.scales

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid, float32 [n, in]."""
        codes = (weights / self.scales).clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
        return codes.float() * self.scales

    def step(self) -> torch.Tensor:
        """Distance to the next code of the same exponent, times the scale."""
        _, exponent = torch.frexp(self.codes.float())  # |x| = m 2^e with m in [0.5, 1)
        exponent = (exponent - 1).clamp(min=_E4M3_LOWEST_EXPONENT) - _E4M3_FRACTION_BITS
        return torch.exp2(exponent.float()) * self.scales

    def inside(self) -> torch.Tensor:
        """Codes below 448."""
        return self.codes.float().abs() < _LARGEST_E4M3
