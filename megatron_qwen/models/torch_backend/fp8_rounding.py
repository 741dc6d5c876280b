"""FP8 values with scales, as the recipes of Transformer Engine make them, in plain torch on any device.

E4M3 holds values and E5M2 holds gradients (Micikevicius et al., arXiv 2209.05433). ``tensorwise`` gives a tensor one
scale, from its own largest value (current scaling); ``blockwise`` gives one to every 1 x 128 values along the summed
dimension of activations and gradients and to every 128 x 128 of weights, each a power of two (DeepSeek-V3, arXiv
2412.19437, section 3.3; Transformer Engine's Float8BlockScaling).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_BLOCK = 128


@dataclass(frozen=True)
class Scaled:
    """An FP8 tensor with its scales; it represents ``values`` x ``inverse``.

    Args:
        values: float8, [n, k].
        inverse: one over the scale, fp32; a scalar, or one of each block, [n / rows, k / columns].
        block: rows and columns of a block; None where there is one scale.
    """

    values: torch.Tensor
    inverse: torch.Tensor
    block: tuple[int, int] | None

    def dequantised(self) -> torch.Tensor:
        """[n, k] in fp32; exact for scales that are powers of two."""
        values = self.values.float()
        if self.block is None:
            return values.mul_(self.inverse)
        return values.mul_(_spread(self.inverse, self.block, self.values.shape))


def tensorwise(x: torch.Tensor, dtype: torch.dtype, *, group: dist.ProcessGroup | None = None) -> Scaled:
    """One scale, from the largest value of the tensor over the ranks that share it.

    Args:
        x: [n, k].
        dtype: ``VALUES`` or ``GRADIENTS``.
        group: ranks that hold other parts of the same tensor.
    """
    largest = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scale = _scale(largest, dtype)
    return Scaled(_cast(x.float() * scale, dtype), scale.reciprocal(), None)


def blockwise(x: torch.Tensor, dtype: torch.dtype, *, block: tuple[int, int]) -> Scaled:
    """A scale, a power of two, for every block of rows x columns; blocks at the edges may be smaller.

    Args:
        x: [n, k].
        dtype: ``VALUES`` or ``GRADIENTS``.
        block: rows and columns.
    """
    largest = F.max_pool2d(x.abs().float()[None], block, ceil_mode=True)[0] if x.numel() else x.float()
    # frexp(s) = m x 2^e with m in [1/2, 1): the power of two that is not above s is 2^(e - 1).
    scale = _scale(largest, dtype)
    power = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), power, scale)
    return Scaled(_cast(x.float() * _spread(scale, block, x.shape), dtype), scale.reciprocal(), block)


def along_columns() -> tuple[int, int]:
    """Block shape of an operand whose GEMM sums over its columns."""
    return 1, _BLOCK


def along_rows() -> tuple[int, int]:
    """Block shape of an operand whose GEMM sums over its rows."""
    return _BLOCK, 1


def square() -> tuple[int, int]:
    """Block shape of a weight; square, so that one rounding serves the output and the input gradient."""
    return _BLOCK, _BLOCK


def _scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Factor that maps the largest value to the largest of the format; 1 where all values are zero.

    A value that is not finite gives 0 or NaN, which makes the tensor NaN: it must not be hidden by saturation.
    """
    scale = torch.finfo(dtype).max / largest
    return torch.where(torch.isinf(scale), 1.0, scale)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to nearest even, and saturates at the largest value of the format. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Expands one value per block to one value per element, [n, k]."""
    rows, columns = block
    return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
