"""AWQ's gemm layout: words along the output dimension, in the order of a CUDA kernel.

A weight of [out, in] is qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] and scales float16 [groups, out];
place k of a word holds column 0 2 4 6 1 3 5 7. A value is (code - zero) x scale. Source: autoawq's WQLinear_GEMM.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.directory_format import SCALE_DTYPES, Part, Scheme
from checkpoints_convert.dequantize.module_names import ModuleNames
from checkpoints_convert.dequantize.packing import AWQ_ORDER, in_awq_order, unpack
from checkpoints_convert.dequantize.quantized_rows import IntegerRows
from checkpoints_convert.dequantize.settings import Settings
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.dequantize.values import scale_fault
from checkpoints_convert.safetensors_format import StoredEntry

_BITS, _PER_WORD = 4, len(AWQ_ORDER)
_MARKS = ("qweight", "qzeros", "scales")
_LARGEST_GROUP = 1 << 20


@dataclass(frozen=True)
class AwqFormat:
    """AWQ with the parameters of a config.json.

    Args:
        group: columns that share a scale; None: all of a row.
        left_out: modules that stay as they are.
    """

    group: int | None
    left_out: ModuleNames

    @classmethod
    def read(cls, settings: Settings) -> "AwqFormat":
        """From ``quantization_config``; problems go to the settings."""
        settings.choice("bits", (_BITS,))
        settings.choice("version", ("gemm",), default="gemm")
        settings.choice("zero_point", (True,))
        group = settings.whole("group_size", low=1, high=_LARGEST_GROUP, also=(-1,))
        return cls(None if group == -1 else group, ModuleNames(settings.names("modules_to_not_convert")))

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""
        return Scheme("awq", f"int{_BITS}", {"group": self.group or "a whole row", "symmetric": False}, may_fold=True)

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1 if self.group is None else columns // self.group

    def is_quantized(self, parts: Mapping[str, StoredEntry]) -> bool:
        """Whether any of the tensors is there."""
        return any(mark in parts for mark in _MARKS)

    def shape_fault(self, shape: tuple[int, int]) -> str | None:
        """Rows go eight to a word, and groups have one length."""
        if shape[0] % _PER_WORD or shape[1] % (self.group or 1):
            return f"has the shape {list(shape)}; AWQ needs rows divisible by 8 and columns by group_size {self.group}."
        return None

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The three tensors."""
        (rows, columns), groups = shape, self.groups(shape[1])
        return {
            "qweight": Part(((columns, rows // _PER_WORD),), (torch.int32,)),
            "qzeros": Part(((groups, rows // _PER_WORD),), (torch.int32,)),
            "scales": Part(((groups, rows),), SCALE_DTYPES),
        }

    def open(self, stored: StoredTensors, module: str, shape: tuple[int, int]) -> "AwqWeight":
        """A weight whose parts were found right."""
        return AwqWeight(self, stored, module, shape)


@dataclass(frozen=True)
class AwqWeight:
    """A weight in AWQ's layout."""

    format: AwqFormat
    stored: StoredTensors
    module: str
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> IntegerRows:
        """Rows: columns of what is stored, read word by word."""
        length = self.format.group or self.shape[1]
        scales = self.stored.columns(f"{self.module}.scales", start, stop).float().t().repeat_interleave(length, dim=1)
        codes, zeros = (self._unpacked(part, start, stop).t() for part in ("qweight", "qzeros"))
        return IntegerRows(codes, scales, zeros.float().repeat_interleave(length, dim=1), 0, (1 << _BITS) - 1)

    def _unpacked(self, part: str, start: int, stop: int) -> torch.Tensor:
        first = start // _PER_WORD
        words = self.stored.columns(f"{self.module}.{part}", first, -(-stop // _PER_WORD))
        return in_awq_order(unpack(words, _BITS, dim=1))[:, start - first * _PER_WORD :][:, : stop - start]

    def faults(self) -> Iterator[tuple[str, str]]:
        """Scales; any code can be the zero."""
        name = f"{self.module}.scales"
        if fault := scale_fault(self.stored, name):
            yield name, fault
