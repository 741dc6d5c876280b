"""Rows of products do not depend on the other rows, of whatever shape, alone and in modules under the context."""

import random

import pytest
import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend import batch_invariance, invariant_gemm
from megatron_qwen.models.torch_backend.batch_invariance import BatchInvariant

pytestmark = pytest.mark.skipif(
    not invariant_gemm.has_onednn(), reason="this build of torch has no oneDNN, without which no row is invariant"
)

WEIGHT = torch.linspace(0, 900, 896 * 40).sin().view(896, 40)


def test_batched_products():
    """Any rows of any members, alone, against all of them at once."""
    dice = random.Random(0)
    for _ in range(150):
        inner, columns = dice.choice([8, 16, 32, 64, 128, 256, 320]), dice.choice([8, 16, 64, 128, 192, 320])
        first, second = torch.randn(4, 64 * dice.choice([1, 2, 3, 7]), inner), torch.randn(4, inner, columns)
        whole = invariant_gemm.batched(first, second)
        torch.testing.assert_close(whole, torch.bmm(first, second), rtol=1e-4, atol=1e-4)
        members, rows = dice.choice([1, 2, 4]), dice.randrange(1, first.shape[1] + 1)
        start = dice.randrange(first.shape[1] - rows + 1)
        few = invariant_gemm.batched(first[:members, start : start + rows], second[:members])
        assert torch.equal(few, whole[:members, start : start + rows]), (first.shape, columns, members, start, rows)


@pytest.mark.parametrize(("m", "k"), [(640, 384), (384, 1024), (1152, 896), (8, 64), (50, 24)])
def test_products_with_a_weight(m, k):
    """Also with a bias, and with a transposed weight or one with gaps."""
    x, weight, bias = torch.randn(300, k), torch.randn(m, k), torch.randn(m)
    whole = invariant_gemm.linear(x, weight, bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    gaps = torch.stack((weight, weight), dim=2)[:, :, 0]
    for count in (1, 2, 3, 4, 7, 31, 64, 257):
        for same in (weight, weight.t().contiguous().t(), gaps):
            assert torch.equal(invariant_gemm.linear(x[:count], same, bias), whole[:count]), count


@pytest.mark.parametrize(
    "compute",
    [
        torch.nn.Linear(896, 320),
        torch.nn.Linear(896, 320, bias=False),
        lambda x: torch.matmul(x, WEIGHT),
        lambda x: torch.mm(x, WEIGHT),
        lambda x: torch.mm(x, WEIGHT, out=torch.empty(len(x), 40)),
        lambda x: torch.addmm(torch.ones(40), x, WEIGHT, beta=0.5, alpha=2.0),
    ],
)
def test_whatever_multiplies_matrices_in_the_context(compute):
    x = torch.randn(300, 896)
    with torch.no_grad(), BatchInvariant():
        assert batch_invariance.is_on()
        whole = compute(x)
        for count in (1, 3, 8, 100):
            assert torch.equal(compute(x[:count]), whole[:count]), count
    assert not batch_invariance.is_on()
    with torch.no_grad():
        torch.testing.assert_close(compute(x), whole, rtol=1e-4, atol=1e-3)


def test_a_layer_in_inference_mode():
    x, layer = torch.randn(3, 100, 896), torch.nn.Linear(896, 320)
    with torch.inference_mode(), BatchInvariant():
        whole = layer(x)
        assert torch.equal(layer(x[1, :5]), whole[1, :5])


def test_gradients_in_the_context():
    x, layer = torch.randn(9, 64, requires_grad=True), torch.nn.Linear(64, 32)
    with BatchInvariant():
        layer(x).square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
