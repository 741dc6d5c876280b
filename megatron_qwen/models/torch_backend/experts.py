"""Grouped GEMMs in plain torch: all experts of a rank in one operation.

A single expert is a few small kernels. Run one by one, they leave a GPU idle and spend a CPU's time in Python. Here
each of the two GEMMs of an MLP runs over all experts: as one kernel where torch has one for the device (grouped_mm),
else expert by expert into one buffer. SwiGLU and the routing weights run once over the tokens of all experts.
Parameters, names and sharding are those of megatron-core's SequentialMLP, so checkpoints are the same.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_qwen.models.torch_backend.adapted_experts import adapted, have_adapters
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.torch_backend.functions import swiglu, swiglu_gradient
from megatron_qwen.models.torch_backend.grouped_gemm import grouped_gemm, grouped_weight_gradients, weighed


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
        if have_adapters(self.local_experts):
            return adapted(permuted_local_hidden_states, permuted_probs, counts, self.local_experts), None
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """rows [n, h], routing weights [n], tokens per expert, then E x [2 f, h] and E x [h, f] -> [n, h].

    Saves its input and the output of the first GEMM for the backward pass; SwiGLU is recomputed there. With frozen
    weights the input is not needed.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, probs: torch.Tensor, counts: tuple[int, ...], *matrices: torch.Tensor
    ) -> torch.Tensor:
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gate_up = grouped_gemm(rows, first, counts)
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[3:]) else None, probs, gate_up, *matrices)
        ctx.counts = counts
        return grouped_gemm(weighed(swiglu(gate_up), probs), second, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, probs, gate_up, *matrices = ctx.saved_tensors
        counts = ctx.counts
        first, second = matrices[: len(counts)], matrices[len(counts) :]
        gradient = gradients[0].contiguous()
        active = swiglu(gate_up)
        frozen = [None] * len(counts)
        grad_second = frozen if rows is None else grouped_weight_gradients(gradient, weighed(active, probs), counts)
        gradweighed = grouped_gemm(gradient, [weight.t() for weight in second], counts)
        grad_probs = (gradweighed * active).sum(dim=-1, dtype=torch.float32).to(probs.dtype)
        grad_active = weighed(gradweighed, probs)
        del active, gradweighed
        grad_gate_up = swiglu_gradient(gate_up, grad_active)
        del grad_active
        grad_first = frozen if rows is None else grouped_weight_gradients(grad_gate_up, rows, counts)
        grad_rows = grouped_gemm(grad_gate_up, [weight.t() for weight in first], counts)
        return grad_rows, grad_probs, None, *grad_first, *grad_second
