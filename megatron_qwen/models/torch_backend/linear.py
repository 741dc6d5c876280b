"""Linear layers on a CPU: the faster GEMM, and weight gradients accumulated in place (gradient accumulation fusion).

megatron-core's layers write every weight gradient into a new tensor, which its hooks add to ``main_grad``, the sum over
micro-batches; its fused kernel for this exists for CUDA only. Here the GEMM adds directly to ``main_grad`` where both
have one format: fp32, or bf16 with precision.grad_reduce_in_fp32=false. A layer with tensor-parallel communication is
left to megatron-core, which overlaps the communication with the weight gradient.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_qwen.models.torch_backend import dense_gemm


class _Linear(torch.autograd.Function):
    """x [..., k], weight [m, k], bias [m] or None -> [..., m]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x w' + bias."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        out = dense_gemm.linear(x.flatten(0, -2), weight, bias)
        # _unsafe_view: autograd forbids in-place operations, which later layers use, on a view from a Function.
        shaped: torch.Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dx = g w, dw = g' x, db = sum of g; of frozen weights only the first."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        grad_x = dense_gemm.linear(gradient, weight.t()).view(*gradients[0].shape[:-1], weight.shape[1])
        grad_weight = None if x is None else _weight_gradient(weight, gradient, x.flatten(0, -2))
        return grad_x, grad_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None


def _weight_gradient(weight: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The weight gradient [m, k]; a placeholder where it was already added to ``main_grad``.

    Autograd needs some gradient to run megatron-core's hooks. They read its values only for a weight that has other
    gradients as well (``zero_out_wgrad``, tied embeddings), so only then it must be zero.
    """
    total: torch.Tensor | None = getattr(weight, "main_grad", None)
    if total is None or not total.dtype == gradient.dtype == rows.dtype:
        return gradient.t() @ rows
    dense_gemm.add_weight_gradient_(total, gradient, rows)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _on_a_cpu_alone(x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> bool:
    communicates = options["allreduce_dgrad"] or options["sequence_parallel"]
    return x.device.type == "cpu" and not communicates


class TorchColumnParallelLinear(ColumnParallelLinear):
    """ColumnParallelLinear (split over output features) with the GEMMs of this file."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor
        if _on_a_cpu_alone(input, weight, options):
            out = _Linear.apply(input, weight, options["bias"])
        else:
            out = super()._forward_impl(input, weight, **options)
        return out


class TorchRowParallelLinear(RowParallelLinear):
    """RowParallelLinear (split over input features) with the GEMMs of this file."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor
        if _on_a_cpu_alone(input, weight, options):
            out = _Linear.apply(input, weight, options["bias"])
        else:
            out = super()._forward_impl(input, weight, **options)
        return out
