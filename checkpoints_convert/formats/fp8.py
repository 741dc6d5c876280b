"""FP8 weights (e4m3) with a scale for a row or for a block of 128 x 128, and the format of DeepSeek-V3 and Qwen3.

That format keeps the name ``weight`` and adds ``weight_scale_inv`` fp32 [ceil(out / 128), ceil(in / 128)], by which a
value is multiplied in spite of its name: https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from checkpoints_convert.encoding import SAME_NAME, EncodedTensor
from checkpoints_convert.formats.kept_modules import kept_modules
from checkpoints_convert.formats.parts import Parts
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem

BLOCK = 128
_DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_DTYPE).max  # 448
# A row or block of zeros needs a scale that can divide and that bf16 and fp16 hold; the smallest normal fp16 is 6.1e-5.
_SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Fp8Rows:
    """Rounds each row by its largest value.

    Args:
        scale_name: of the scales, [out, 1].
        scale_dtype: their format.
    """

    scale_name: str
    scale_dtype: torch.dtype

    @property
    def block_rows(self) -> int:
        """One."""
        return 1

    @property
    def working_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """Values and scales."""
        return {
            SAME_NAME: EncodedTensor(shape, _DTYPE),
            self.scale_name: EncodedTensor((shape[0], 1), self.scale_dtype),
        }

    def encode(self, rows: torch.Tensor, *, name: str) -> Mapping[str, torch.Tensor]:
        """Rounds rows [n, in].

        Raises:
            ConversionError: a value is not finite.
        """
        values = rows.float()
        scales = _scales(values.abs().amax(dim=1, keepdim=True), self.scale_dtype, name)
        return Parts({SAME_NAME: lambda: _rounded(values, scales), self.scale_name: lambda: scales})


@dataclass(frozen=True)
class Fp8Blocks:
    """Rounds each block of 128 x 128 by its largest value; the last ones may be smaller.

    Args:
        scale_name: of the scales, [ceil(out / 128), ceil(in / 128)].
        scale_dtype: their format.
    """

    scale_name: str
    scale_dtype: torch.dtype

    @property
    def block_rows(self) -> int:
        """128."""
        return BLOCK

    @property
    def working_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """Values and scales."""
        blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
        return {SAME_NAME: EncodedTensor(shape, _DTYPE), self.scale_name: EncodedTensor(blocks, self.scale_dtype)}

    def encode(self, rows: torch.Tensor, *, name: str) -> Mapping[str, torch.Tensor]:
        """Rounds rows [n, in].

        Raises:
            ConversionError: a value is not finite.
        """
        height, width = rows.shape
        values = pad(rows.float(), (0, -width % BLOCK, 0, -height % BLOCK))
        blocks = values.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows of blocks, 128, columns of, 128]
        scales = _scales(blocks.abs().amax(dim=(1, 3), keepdim=True), self.scale_dtype, name)

        def rounded() -> torch.Tensor:
            return _rounded(blocks, scales).flatten(2, 3).flatten(0, 1)[:height, :width]

        return Parts({SAME_NAME: rounded, self.scale_name: lambda: scales[:, 0, :, 0]})


def _scales(largest: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    scales = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE).to(dtype)
    if not scales.isfinite().all():
        raise ConversionError(Problem(name, None, "holds values that are not finite; no scale fits them."))
    return scales


def _rounded(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # A scale that was rounded down would bring the largest value above 448, which e4m3 has no infinity for.
    return (values / scales.float()).clamp(-_LARGEST, _LARGEST).to(_DTYPE)


@dataclass(frozen=True)
class Fp8Block:
    """The format of DeepSeek-V3 and of Qwen3's FP8 releases; inputs are rounded in groups of 128 when they come."""

    @property
    def name(self) -> str:
        """``fp8-block``."""
        return "fp8-block"

    @property
    def grid(self) -> None:
        """None: e4m3 is no grid."""

    def encoding(self) -> Fp8Blocks:
        """Rounds to nearest."""
        return Fp8Blocks("weight_scale_inv", torch.float32)

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """Not possible."""
        raise NotImplementedError("FP8 weights are rounded to nearest")

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """None: the last blocks may be smaller."""
        return None

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As Qwen's releases have it."""
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept_modules(model),
        }

    def files(self, model: ModelConfig) -> dict[str, str]:
        """None."""
        return {}
