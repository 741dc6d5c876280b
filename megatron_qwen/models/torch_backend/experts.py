"""The experts of a rank in plain torch, all of them in one operation.

An expert by itself is a few small kernels; one after the other they leave a GPU idle and a CPU in Python. Here each
of the two products runs over all experts: as one kernel where torch has one for the device (grouped_mm), else product
by product into one buffer. What lies between them runs once over the tokens of all experts. Parameters, their names
and their shards are megatron-core's SequentialMLP.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_qwen import device
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.torch_backend.functions import swiglu, swiglu_gradient

# torch's kernel for products of groups wants the weights side by side: a copy of them, which the loop saves.
_KERNEL_FROM_CAPABILITY = (9, 0)


class GroupedExperts(SequentialMLP):
    """SwiGLU experts without biases; the tokens come sorted by expert."""

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Each token through its expert, weighed before the second product as the core does.

        Args:
            permuted_local_hidden_states: [n, h], sorted by expert.
            tokens_per_expert: tokens of each expert of this rank, [experts].
            permuted_probs: weight of each row, [n].

        Returns:
            [n, h], and no bias.
        """
        assert not self.config.moe_apply_probs_on_input
        first = [arrived_weight(expert.linear_fc1) for expert in self.local_experts]
        second = [arrived_weight(expert.linear_fc2) for expert in self.local_experts]
        counts = tuple(tokens_per_expert.tolist())
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """rows [n, h], weights of rows [n], tokens of each expert, then E x [2 f, h] and E x [h, f] -> [n, h].

    For the backward pass it keeps its input and the first product; SwiGLU is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, probs: torch.Tensor, counts: tuple[int, ...], *matrices: torch.Tensor
    ) -> torch.Tensor:
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gate_up = products(rows, first, counts)
        ctx.save_for_backward(rows, probs, gate_up, *matrices)
        ctx.counts = counts
        return products(_weighed(swiglu(gate_up), probs), second, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, probs, gate_up, *matrices = ctx.saved_tensors
        counts = ctx.counts
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gradient = gradients[0].contiguous()
        active = swiglu(gate_up)
        grad_second = weight_gradients(gradient, _weighed(active, probs), counts)
        grad_weighed = products(gradient, [weight.t() for weight in second], counts)
        grad_probs = (grad_weighed * active).sum(dim=-1, dtype=torch.float32).to(probs.dtype)
        grad_active = _weighed(grad_weighed, probs)
        del active, grad_weighed
        grad_gate_up = swiglu_gradient(gate_up, grad_active)
        del grad_active
        grad_first = weight_gradients(grad_gate_up, rows, counts)
        grad_rows = products(grad_gate_up, [weight.t() for weight in first], counts)
        return grad_rows, grad_probs, None, *grad_first, *grad_second


def _weighed(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Rows times their weight, in the weights' precision and then in the rows'."""
    return (x * probs.unsqueeze(-1)).to(x.dtype)


def products(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int], *, kernel: bool | None = None
) -> torch.Tensor:
    """Each group of rows times its weight, transposed.

    Args:
        rows: [n, inner], the groups one after the other.
        weights: [outer, inner] of each group.
        counts: rows of each group; their sum is n.
        kernel: whether to use torch's one kernel; None is where it pays.

    Returns:
        [n, outer].
    """
    if _one_kernel(rows) if kernel is None else kernel:
        return F.grouped_mm(rows, torch.stack(tuple(weights)).transpose(-2, -1), offs=_ends(counts, rows.device))
    result = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for weight, begin, end in zip(weights, *_bounds(counts), strict=True):
        if end > begin:
            torch.mm(rows[begin:end], weight.t(), out=result[begin:end])
    return result


def weight_gradients(
    gradients: torch.Tensor, rows: torch.Tensor, counts: Sequence[int], *, kernel: bool | None = None
) -> list[torch.Tensor]:
    """Transposed gradients of each group of rows times its rows.

    Args:
        gradients: [n, outer].
        rows: [n, inner].
        counts: rows of each group; their sum is n.
        kernel: as for ``products``.

    Returns:
        [outer, inner] of each group; zeros where it has no row.
    """
    if _one_kernel(rows) if kernel is None else kernel:
        return list(F.grouped_mm(gradients.t(), rows, offs=_ends(counts, rows.device)).unbind())
    return [gradients[begin:end].t() @ rows[begin:end] for begin, end in zip(*_bounds(counts), strict=True)]


def _one_kernel(rows: torch.Tensor) -> bool:
    # Rows begin at multiples of 16 bytes for it.
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[1] % 8:
        return False
    return device.compute_capability() >= _KERNEL_FROM_CAPABILITY


def _bounds(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """First row of each group and the row after its last."""
    begins, ends, end = [], [], 0
    for count in counts:
        begins.append(end)
        end += count
        ends.append(end)
    return begins, ends


def _ends(counts: Sequence[int], place: torch.device) -> torch.Tensor:
    return torch.tensor(_bounds(counts)[1], dtype=torch.int32, device=place)
