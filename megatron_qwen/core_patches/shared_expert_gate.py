"""The gate of a shared expert gives a token the same bits whatever other tokens are beside it.

Replaces: ``SharedExpertMLP.forward`` of ``megatron.core.transformer.moe.shared_experts`` on a CPU, by one that makes
    the gate a GEMM of four columns, three of them zeros.
Needed: with megatron-core 0.19.2 and torch 2.15: a product with a single column is a matrix times a vector, which MKL
    sums by the number of rows. Inference computes token by token what training computes at once, and their
    log-probabilities would differ. A GEMM of several columns does not depend on its rows
    (models/torch_backend/dense_gemm.py).
When: after megatron.core is imported, on every process without a GPU.
Can go: when megatron-core's batch-invariant mode runs on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_qwen.core_patches.replacement import wrap

_ZEROS = (0, 0, 0, 3)  # padding of a matrix: three rows at its end


def apply() -> None:
    """Wraps the method, once."""
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    wrap(SharedExpertMLP, "forward", _with_several_columns)


def _with_several_columns(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from megatron.core.transformer.mlp import MLP

    @functools.wraps(plain)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.use_shared_expert_gate:
            return plain(self, hidden_states)
        output, _ = MLP.forward(self, hidden_states)
        gates = F.linear(hidden_states, F.pad(self.gate_weight, _ZEROS))
        gated: torch.Tensor = output * torch.sigmoid(gates[..., :1])
        return gated

    return forward
