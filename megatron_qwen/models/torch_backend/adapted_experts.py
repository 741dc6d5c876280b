"""Experts with adapters (``models/lora``): the grouped GEMMs of ``experts.py``, each an operation of its own.

Experts without adapters are one operation that recomputes SwiGLU in its backward pass. An adapter reads and adds
between the GEMMs, so here autograd keeps what lies between them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_qwen.hf.adapters import ADAPTERS
from megatron_qwen.models.lora.linear import Adapters
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.torch_backend.functions import SwiGLU
from megatron_qwen.models.torch_backend.grouped_gemm import grouped_gemm, grouped_weight_gradients, weighed

Counts = tuple[int, ...]


def have_adapters(experts: Sequence[torch.nn.Module]) -> bool:
    """Whether any of their layers has one; all experts are alike."""
    return any(name.endswith(ADAPTERS) for name, _ in experts[0].named_children())


def adapted(
    rows: torch.Tensor, probs: torch.Tensor, counts: Counts, experts: Sequence[torch.nn.Module]
) -> torch.Tensor:
    """Applies to each token its expert.

    Args:
        rows: [n, h], sorted by expert.
        probs: routing weight of each row, [n].
        counts: rows of each expert.
        experts: megatron-core's MLPs of this rank.

    Returns:
        [n, h].
    """
    active: torch.Tensor = SwiGLU.apply(_layer(rows, counts, experts, "linear_fc1"))
    return _layer(weighed(active, probs), counts, experts, "linear_fc2")


def _layer(rows: torch.Tensor, counts: Counts, experts: Sequence[torch.nn.Module], name: str) -> torch.Tensor:
    """A linear layer of every expert with its adapters."""
    out = _grouped(rows, counts, [arrived_weight(expert.get_submodule(name)) for expert in experts])
    each = [getattr(expert, f"{name}{ADAPTERS}", None) for expert in experts]
    first = each[0]
    if not isinstance(first, Adapters):
        return out
    matrices = [adapters.matrices() for adapters in each if adapters is not None]
    products = {}
    for part in matrices[0]:
        low = _grouped(first.dropped(rows), counts, [of_expert[part][0] for of_expert in matrices])
        products[part] = _grouped(first.scale * low, counts, [of_expert[part][1] for of_expert in matrices])
    return out + first.joined(products)


def _grouped(rows: torch.Tensor, counts: Counts, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = _GroupedLinear.apply(rows, counts, *weights)
    return found


class _GroupedLinear(torch.autograd.Function):
    """rows [n, inner], rows of each group, then a weight [outer, inner] of each group -> [n, outer]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Counts, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[2:]) else None, *weights)
        ctx.counts = counts
        return grouped_gemm(rows, weights, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        grad_rows = grouped_gemm(gradient, [weight.t() for weight in weights], ctx.counts)
        if rows is None:
            return grad_rows, None, *[None] * len(weights)
        return grad_rows, None, *grouped_weight_gradients(gradient, rows, ctx.counts)
