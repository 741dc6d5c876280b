"""The gate of a shared expert does not depend on the number of tokens."""

from unittest import mock

import torch

ROWS = (4, 5, 7, 18, 31, 64, 100)


def observe(prepared: bool) -> list[int]:
    """Numbers of tokens with which the gates of the first differ from those of all."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    torch.manual_seed(1)
    hidden = torch.randn(256, 1, 64)
    expert = SharedExpertMLP.__new__(SharedExpertMLP)
    torch.nn.Module.__init__(expert)
    expert.use_shared_expert_gate, expert.gate_weight = True, torch.nn.Parameter(torch.randn(1, 64))

    @torch.no_grad()
    def gates(tokens: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(MLP, "forward", lambda self, hidden: (torch.ones_like(hidden), None)):
            return expert.forward(tokens)

    whole = gates(hidden)
    torch.testing.assert_close(whole, torch.sigmoid(hidden @ expert.gate_weight.t()).expand_as(whole))
    return [count for count in ROWS if not torch.equal(gates(hidden[:count]), whole[:count])]


def test_a_tokens_gate_is_its_own(observed):
    assert observed.prepared == []
