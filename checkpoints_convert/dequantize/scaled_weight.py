"""A weight whose values are stored row by row in their own places, int8 or FP8, with scales next to them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.quantized_rows import Fp8Rows, IntegerRows, QuantizedRows
from checkpoints_convert.dequantize.scale_layout import ScaleLayout
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.dequantize.values import scale_fault

INT8 = (-128, 127)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight [out, in] of int8 or float8_e4m3fn.

    Args:
        stored: where its tensors are.
        module: name of the layer.
        shape: [out, in].
        layout: of the scales.
        scale: last component of the scales' name.
        zero_point: last component of the zeros' name; None: zero is 0.
    """

    stored: StoredTensors
    module: str
    shape: tuple[int, int]
    layout: ScaleLayout
    scale: str
    zero_point: str | None = None

    def rows(self, start: int, stop: int) -> QuantizedRows:
        """Rows with the scales that they need."""
        codes = self.stored.rows(f"{self.module}.weight", start, stop)
        scales = self._spread(self.scale, start, stop)
        if codes.dtype == torch.float8_e4m3fn:
            return Fp8Rows(codes, scales)
        zeros = torch.zeros(1, 1) if self.zero_point is None else self._spread(self.zero_point, start, stop)
        return IntegerRows(codes, scales, zeros, *INT8)

    def _spread(self, part: str, start: int, stop: int) -> torch.Tensor:
        found = self.layout.read(self.stored, f"{self.module}.{part}", start, stop)
        return self.layout.spread(found, start, stop, self.shape[1])

    def faults(self) -> Iterator[tuple[str, str]]:
        """Scales; any value can be a zero point."""
        name = f"{self.module}.{self.scale}"
        if fault := scale_fault(self.stored, name):
            yield name, fault
