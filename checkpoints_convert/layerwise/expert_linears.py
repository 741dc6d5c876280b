"""Experts as linear layers of their own, where transformers holds them as stacked tensors.

transformers 5 keeps the experts of a layer in two parameters, ``gate_up_proj`` [E, 2 f, h] and ``down_proj`` [E, h, f],
and multiplies slices of them (``Qwen2MoeExperts``, ``Qwen3MoeExperts``). No hook sees the input of one expert there.
"""

from typing import Any

import torch
from torch import nn


class _Expert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: Any) -> None:
        super().__init__()
        half = gate_up.shape[0] // 2
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate_up[:half], gate_up[half:], down))
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [n, h]."""
        found: torch.Tensor = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return found


class SeparateExperts(nn.ModuleList):
    """The experts of a layer; each computes the tokens that are routed to it, and no others.

    Args:
        stacked: transformers' module, whose tensors are shared, not copied.
    """

    def __init__(self, stacked: Any) -> None:
        pairs = zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
        super().__init__(_Expert(gate_up, down, stacked.act_fn) for gate_up, down in pairs)

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sums what the chosen experts make of every token.

        Args:
            hidden: [n, h].
            experts: [n, k], the experts of a token.
            weights: [n, k], their shares.

        Returns:
            [n, h].
        """
        total = torch.zeros_like(hidden)
        for index in experts.unique().tolist():
            token, place = torch.where(experts == index)
            made = self[index](hidden[token]) * weights[token, place, None]
            total.index_add_(0, token, made.to(total.dtype))
        return total


def separate_experts(layer: nn.Module) -> None:
    """Puts linear layers in the place of stacked experts; leaves a layer alone that has none."""
    mlp: Any = getattr(layer, "mlp", None)
    experts = getattr(mlp, "experts", None)
    if isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
        mlp.experts = SeparateExperts(experts)


def _linear(weight: torch.Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found
