"""A weight whose codes lie row by row in words, as compressed-tensors' pack-quantized has it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.packing import WORD, unpack
from checkpoints_convert.dequantize.quantized_rows import IntegerRows
from checkpoints_convert.dequantize.scale_layout import ScaleLayout
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.dequantize.values import index_fault, scale_fault


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] of integer codes, value + 2^(bits - 1), low bits first.

    Args:
        stored: where its tensors are.
        module: name of the layer.
        shape: [out, in].
        bits: of a code.
        layout: of the scales.
        symmetric: whether zero is the middle code; otherwise weight_zero_point is packed along the rows.
        act_order: whether weight_g_idx gives the group of every column.
    """

    stored: StoredTensors
    module: str
    shape: tuple[int, int]
    bits: int
    layout: ScaleLayout
    symmetric: bool
    act_order: bool

    def rows(self, start: int, stop: int) -> IntegerRows:
        """Rows with the scales and zeros that they need."""
        columns, high = self.shape[1], (1 << self.bits) - 1
        codes = unpack(self.stored.rows(f"{self.module}.weight_packed", start, stop), self.bits, dim=1)[:, :columns]
        group_of = self.stored.whole(f"{self.module}.weight_g_idx").long() if self.act_order else None
        found = self.layout.read(self.stored, f"{self.module}.weight_scale", start, stop)
        scales = self.layout.spread(found, start, stop, columns, group_of=group_of)
        if self.symmetric:
            return IntegerRows(codes, scales, torch.full((1, 1), float(1 << (self.bits - 1))), 0, high)
        zeros = self.layout.spread(self._zeros(start, stop), start, stop, columns, group_of=group_of)
        return IntegerRows(codes, scales, zeros, 0, high)

    def _zeros(self, start: int, stop: int) -> torch.Tensor:
        per_word = WORD // self.bits
        first = start // per_word
        words = self.stored.rows(f"{self.module}.weight_zero_point", first, -(-stop // per_word))
        return unpack(words, self.bits, dim=0)[start - first * per_word :][: stop - start].float()

    def faults(self) -> Iterator[tuple[str, str]]:
        """Scales, the shape, and the groups of columns."""
        scale, shape, index = (f"{self.module}.weight_{part}" for part in ("scale", "shape", "g_idx"))
        if fault := scale_fault(self.stored, scale):
            yield scale, fault
        told = self.stored.whole(shape).tolist()
        if told != list(self.shape):
            yield shape, f"says {told} where config.json says {list(self.shape)}."
        groups = self.layout.grid(self.shape)[1]
        if self.act_order and (fault := index_fault(self.stored, index, groups=groups)):
            yield index, fault
