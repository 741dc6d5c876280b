"""AWQ's format in 4 bits, version "gemm": https://github.com/casper-hansen/AutoAWQ

A layer is ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` fp16 [groups, out]. Place
k of a word, from the lowest bits, holds output 0 2 4 6 1 3 5 7 of its eight. A weight is (q - z) * s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_convert.encoding import EncodedTensor
from checkpoints_convert.formats.grid_encoding import GridEncoding
from checkpoints_convert.formats.kept_modules import grid_shape_problem, kept_modules
from checkpoints_convert.formats.parts import Parts
from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem

_BITS, _WORD = 4, 8
# Two halves of a word are unpacked by one instruction each on a GPU, which puts even and odd outputs apart.
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq:
    """The format with its options.

    Args:
        group: inputs that share a scale and a zero.
    """

    group: int = 128

    @property
    def name(self) -> str:
        """``awq-int4``."""
        return "awq-int4"

    @property
    def grid(self) -> Grid:
        """Asymmetric groups of inputs; scales in fp16."""
        return Grid(_BITS, self.group, False, torch.float16)

    def encoding(self) -> GridEncoding:
        """Rounds to nearest."""
        return GridEncoding(self, None, side_rows=_WORD)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """The three tensors of a layer of [out, in]."""
        rows, columns = shape
        groups = self.grid.groups(columns)
        return {
            "qweight": EncodedTensor((columns, rows // _WORD), torch.int32),
            "qzeros": EncodedTensor((groups, rows // _WORD), torch.int32),
            "scales": EncodedTensor((groups, rows), torch.float16),
        }

    def packed(self, codes: Callable[[], torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor) -> Parts:
        """All of them, of codes [out, in], scales and zeros [out, groups]."""
        return Parts(
            {"qweight": lambda: _words(codes()), "qzeros": lambda: _words(zeros), "scales": lambda: scales.T.half()}
        )

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """All of them."""
        assert linear.group_of is None, "AWQ has no g_idx: its groups are consecutive"
        return self.packed(lambda: linear.codes, linear.scales, linear.zeros)

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """Inputs that are no whole groups, or outputs that fill no word."""
        return grid_shape_problem(name, shape, self.grid, words_along_rows=True)

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As Qwen's releases have it."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": self.group,
            "zero_point": True,
            "modules_to_not_convert": kept_modules(model),
        }

    def files(self, model: ModelConfig) -> dict[str, str]:
        """None."""
        return {}


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n] as int32 [n, out / 8]."""
    rows, columns = codes.shape
    eights = codes.view(rows // _WORD, _WORD, columns)[:, list(PLACES)]
    # Of bytes with two codes, then: a quarter of what a transposition of the codes would move at a time.
    pairs = eights[:, 0::2] | (eights[:, 1::2] << 4)  # [out / 8, 4, n]
    return pairs.permute(2, 0, 1).reshape(-1).view(torch.int32).view(columns, rows // _WORD)


def unpacked_words(words: torch.Tensor) -> torch.Tensor:
    """The inverse: int32 [n, out / 8] as uint8 [out, n]."""
    pairs = words.reshape(-1).view(torch.uint8).view(*words.shape, _WORD // 2)
    eights = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(2)  # [n, out / 8, 8], by place
    codes = torch.empty_like(eights)
    codes[:, :, list(PLACES)] = eights
    return codes.flatten(1).T.contiguous()
