"""Linear layers on a CPU: the faster product, and weight gradients added where they are summed.

The core's layers write every weight gradient into a tensor of its own, which its hooks add to the sum over
micro-batches; its fused kernel for this is CUDA's. Here they go to the sum at once where both have one format: fp32, or
bf16 with precision.grad_reduce_in_fp32=false. A layer whose product communicates is left to the core, which does both
at once.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_qwen.models.torch_backend import dense_gemm as dense_product


class _Linear(torch.autograd.Function):
    """x [..., k], weight [m, k], bias [m] or None -> [..., m]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x w' + bias."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = dense_product.linear(x.flatten(0, -2), weight, bias)
        # Not a view: what follows may work in place.
        shaped: torch.Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """dx = g w, dw = g' x, db = sum of g."""
        x, weight = ctx.saved_tensors
        gradient, rows = gradients[0].flatten(0, -2), x.flatten(0, -2)
        grad_x = dense_product.linear(gradient, weight.t()).view_as(x)
        grad_bias = gradient.sum(0) if ctx.has_bias else None
        return grad_x, _weight_gradient(weight, gradient, rows), grad_bias


def _weight_gradient(weight: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The gradient; where it is in the sum already, one in its place, for the core's hooks to run.

    They add it only to a weight that has other gradients as well (``zero_out_wgrad``); else nobody reads it.
    """
    total: torch.Tensor | None = getattr(weight, "main_grad", None)
    if total is None or not total.dtype == gradient.dtype == rows.dtype:
        return gradient.t() @ rows
    dense_product.add_weight_gradient_(total, gradient, rows)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _on_a_cpu_alone(x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> bool:
    communicates = options["allreduce_dgrad"] or options["sequence_parallel"]
    return x.device.type == "cpu" and weight.requires_grad and not communicates


class TorchColumnParallelLinear(ColumnParallelLinear):
    """Split over its output features."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor
        if _on_a_cpu_alone(input, weight, options):
            out = _Linear.apply(input, weight, options["bias"])
        else:
            out = super()._forward_impl(input, weight, **options)
        return out


class TorchRowParallelLinear(RowParallelLinear):
    """Split over its input features."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor
        if _on_a_cpu_alone(input, weight, options):
            out = _Linear.apply(input, weight, options["bias"])
        else:
            out = super()._forward_impl(input, weight, **options)
        return out
