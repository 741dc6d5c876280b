"""Linear layers that emulate FP8: their three GEMMs take operands rounded to FP8, and accumulate in fp32.

The emulation is for studying a recipe's numerics where no GPU has FP8; it is slow. It differs from Transformer Engine
in one thing: with tensor parallelism a weight has one scale over all its shards, so that a layout does not change the
result.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_qwen.models.torch_backend import fp8_rounding
from megatron_qwen.models.torch_backend.fp8_rounding import GRADIENTS, VALUES, Scaled


class _Fp8Gemm(torch.autograd.Function):
    """x [n, k], weight [m, k] -> [n, m]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: str, group: dist.ProcessGroup) -> torch.Tensor:
        """Rounds both and keeps what the backward pass multiplies."""
        by_token, by_feature = _both_ways(x, VALUES, recipe, group)
        rounded = _weight(weight, recipe, group)
        ctx.by_feature, ctx.weight, ctx.recipe, ctx.group = by_feature, rounded, recipe, group
        ctx.dtypes = x.dtype, weight.dtype
        return (by_token.dequantised() @ rounded.dequantised().t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dx = g w and dw = g' x, with g rounded to E5M2."""
        by_token, by_feature = _both_ways(gradients[0], GRADIENTS, ctx.recipe, ctx.group)
        grad_x = by_token.dequantised() @ ctx.weight.dequantised()
        grad_weight = by_feature.dequantised().t() @ ctx.by_feature.dequantised()
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None


def _both_ways(x: torch.Tensor, dtype: torch.dtype, recipe: str, group: dist.ProcessGroup) -> tuple[Scaled, Scaled]:
    """[n, k] rounded for the GEMM that sums over k (output), and for the one that sums over n (weight gradient).

    Blocks lie along the summed dimension, so blockwise needs both; a tensor with one scale serves both GEMMs.
    """
    if recipe == "tensorwise":
        one = fp8_rounding.tensorwise(x, dtype, group=group)
        return one, one
    return (
        fp8_rounding.blockwise(x, dtype, block=fp8_rounding.along_columns()),
        fp8_rounding.blockwise(x, dtype, block=fp8_rounding.along_rows()),
    )


def _weight(weight: torch.Tensor, recipe: str, group: dist.ProcessGroup) -> Scaled:
    if recipe == "tensorwise":
        return fp8_rounding.tensorwise(weight, VALUES, group=group)
    return fp8_rounding.blockwise(weight, VALUES, block=fp8_rounding.square())


def _forward(
    layer: "ColumnParallelLinear | RowParallelLinear",
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    recipe: str,
    gather: bool,
    reduce_gradient: bool,
) -> torch.Tensor:
    """The layer's GEMM, with the tensor-parallel communication of the input and of its gradient."""
    if gather:
        x = tensor_parallel.gather_from_sequence_parallel_region(x, group=layer.tp_group)
    elif reduce_gradient:
        x = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=layer.tp_group)
    y: torch.Tensor = _Fp8Gemm.apply(x.reshape(-1, x.shape[-1]), weight, recipe, layer.tp_group).view(
        *x.shape[:-1], len(weight)
    )
    return y if bias is None else y + bias


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Split over its output features; ``recipe`` is set by the subclass that a provider makes."""

    recipe: str

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        gather, reduce_gradient = options["sequence_parallel"], options["allreduce_dgrad"]
        bias = options["bias"]
        return _forward(self, input, weight, bias, recipe=self.recipe, gather=gather, reduce_gradient=reduce_gradient)


class Fp8RowParallelLinear(RowParallelLinear):
    """Split over its input features."""

    recipe: str

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return _forward(self, input, weight, options["bias"], recipe=self.recipe, gather=False, reduce_gradient=False)


class TensorwiseColumnParallelLinear(Fp8ColumnParallelLinear):
    """One scale a tensor."""

    recipe = "tensorwise"


class TensorwiseRowParallelLinear(Fp8RowParallelLinear):
    """One scale a tensor."""

    recipe = "tensorwise"


class BlockwiseColumnParallelLinear(Fp8ColumnParallelLinear):
    """A scale a block."""

    recipe = "blockwise"


class BlockwiseRowParallelLinear(Fp8RowParallelLinear):
    """A scale a block."""

    recipe = "blockwise"
