"""Grouped GEMMs in plain torch: all experts of a rank in one operation.

A single expert is a few small kernels. Run one by one, they leave a GPU idle and spend a CPU's time in Python. Here
each of the two GEMMs of an MLP runs over all experts: as one kernel where torch has one for the device (grouped_mm),
else expert by expert into one buffer. SwiGLU and the routing weights run once over the tokens of all experts.
Parameters, names and sharding are those of megatron-core's SequentialMLP, so checkpoints are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_qwen import device
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.torch_backend.functions import swiglu, swiglu_gradient
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS, filled

# Compute capability from which grouped_mm is used (Hopper). It needs the weights of all experts in one tensor, which
# costs a copy that the loop does not need.
_KERNEL_FROM_CAPABILITY = (9, 0)


class GroupedExperts(SequentialMLP):
    """SwiGLU experts without biases, for tokens that are sorted by expert."""

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Applies to each token its expert. The routing weight is applied before the second GEMM, as in megatron-core.

        Args:
            permuted_local_hidden_states: [n, h], sorted by expert.
            tokens_per_expert: tokens of each expert of this rank, [experts].
            permuted_probs: routing weight of each row, [n].

        Returns:
            [n, h], and None for the bias.
        """
        assert not self.config.moe_apply_probs_on_input
        first = [arrived_weight(expert.linear_fc1) for expert in self.local_experts]
        second = [arrived_weight(expert.linear_fc2) for expert in self.local_experts]
        counts = tuple(tokens_per_expert.tolist())
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """rows [n, h], routing weights [n], tokens per expert, then E x [2 f, h] and E x [h, f] -> [n, h].

    Saves its input and the output of the first GEMM for the backward pass; SwiGLU is recomputed there.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, probs: torch.Tensor, counts: tuple[int, ...], *matrices: torch.Tensor
    ) -> torch.Tensor:
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gate_up = grouped_gemm(rows, first, counts)
        ctx.save_for_backward(rows, probs, gate_up, *matrices)
        ctx.counts = counts
        return grouped_gemm(_weighed(swiglu(gate_up), probs), second, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, probs, gate_up, *matrices = ctx.saved_tensors
        counts = ctx.counts
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gradient = gradients[0].contiguous()
        active = swiglu(gate_up)
        grad_second = grouped_weight_gradients(gradient, _weighed(active, probs), counts)
        grad_weighed = grouped_gemm(gradient, [weight.t() for weight in second], counts)
        grad_probs = (grad_weighed * active).sum(dim=-1, dtype=torch.float32).to(probs.dtype)
        grad_active = _weighed(grad_weighed, probs)
        del active, grad_weighed
        grad_gate_up = swiglu_gradient(gate_up, grad_active)
        del grad_active
        grad_first = grouped_weight_gradients(grad_gate_up, rows, counts)
        grad_rows = grouped_gemm(grad_gate_up, [weight.t() for weight in first], counts)
        return grad_rows, grad_probs, None, *grad_first, *grad_second


def _weighed(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[n, f] times [n]: multiplied in the routing weights' precision (fp32), then rounded to the format of the rows."""
    return (x * probs.unsqueeze(-1)).to(x.dtype)


def grouped_gemm(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int], *, kernel: bool | None = None
) -> torch.Tensor:
    """Grouped GEMM: each group of rows times its transposed weight.

    Args:
        rows: [n, inner], sorted by group.
        weights: [outer, inner] of each group.
        counts: rows of each group; their sum is n.
        kernel: whether to use grouped_mm; None decides by device and format.

    Returns:
        [n, outer].
    """
    if _one_kernel(rows) if kernel is None else kernel:
        return F.grouped_mm(rows, torch.stack(tuple(weights)).transpose(-2, -1), offs=_ends(counts, rows.device))
    result = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for weight, begin, end in zip(weights, *_bounds(counts), strict=True):
        if end - begin >= INVARIANT_ROWS:
            torch.mm(rows[begin:end], weight.t(), out=result[begin:end])
        elif end > begin:
            result[begin:end] = torch.mm(filled(rows[begin:end]), weight.t())[: end - begin]
    return result


def grouped_weight_gradients(
    gradients: torch.Tensor, rows: torch.Tensor, counts: Sequence[int], *, kernel: bool | None = None
) -> list[torch.Tensor]:
    """Weight gradients of a grouped GEMM: transposed output gradients of each group times its rows.

    Args:
        gradients: gradients of the output, [n, outer].
        rows: [n, inner].
        counts: rows of each group; their sum is n.
        kernel: as for ``grouped_gemm``.

    Returns:
        [outer, inner] of each group; zeros where it has no row.
    """
    if _one_kernel(rows) if kernel is None else kernel:
        return list(F.grouped_mm(gradients.t(), rows, offs=_ends(counts, rows.device)).unbind())
    return [gradients[begin:end].t() @ rows[begin:end] for begin, end in zip(*_bounds(counts), strict=True)]


def _one_kernel(rows: torch.Tensor) -> bool:
    # grouped_mm supports bf16 only, and requires rows aligned to 16 bytes (8 elements).
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[1] % 8:
        return False
    return device.compute_capability() >= _KERNEL_FROM_CAPABILITY


def _bounds(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """First row of each group, and the row after its last."""
    begins, ends, end = [], [], 0
    for count in counts:
        begins.append(end)
        end += count
        ends.append(end)
    return begins, ends


def _ends(counts: Sequence[int], place: torch.device) -> torch.Tensor:
    return torch.tensor(_bounds(counts)[1], dtype=torch.int32, device=place)
