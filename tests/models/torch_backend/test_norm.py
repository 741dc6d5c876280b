"""The norm layer computes its definition with the epsilon that it was given."""

from types import SimpleNamespace

import pytest
import torch

from megatron_qwen.models.torch_backend.norm import RMSNorm


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.25])
def test_the_norm_by_its_definition(eps):
    """Inputs of the size of the root of epsilon: there it decides the result."""
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 8, eps)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x = torch.randn(5, 3, 8) * eps**0.5
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_the_weight_says_whether_its_gradient_is_a_part(split):
    """Under sequence parallelism megatron-core adds up the gradients of weights with this mark over the TP group."""
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=split), 8)
    assert norm.weight.sequence_parallel is split
