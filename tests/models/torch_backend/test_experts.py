"""Experts together against experts one by one."""

import pytest
import torch

from megatron_qwen.models.torch_backend import experts as torch_experts
from megatron_qwen.models.torch_backend.grouped_gemm import grouped_gemm, grouped_weight_gradients

# Experts without a token at either end and inside; one that has them all.
COUNTS = [(3, 0, 5, 8), (0, 16, 0, 0), (0, 7, 9, 0)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def one_by_one(rows, probs, counts, first, second):
    """What megatron-core's sequence of experts computes, in plain torch with autograd."""
    parts = []
    for part, weight, fc1, fc2 in zip(rows.split(counts), probs.split(counts), first, second, strict=True):
        gate, up = (part @ fc1.t()).chunk(2, dim=-1)
        active = torch.nn.functional.silu(gate) * up
        parts.append((active * weight.unsqueeze(-1)).to(active.dtype) @ fc2.t())
    return torch.cat(parts)


def example(counts, dtype, *, seed=0):
    """Rows, weights of rows and the matrices of the experts, all with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(kind).requires_grad_()

    n, h, f = sum(counts), 16, 24
    probs = torch.rand(n, generator=generator).requires_grad_()
    return draw(n, h), probs, [draw(2 * f, h) for _ in counts], [draw(h, f) for _ in counts]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_same_as_one_by_one(counts, dtype):
    rows, probs, first, second = example(counts, dtype)
    leaves = [rows, probs, *first, *second]
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = one_by_one(rows, probs, counts, first, second)
    wanted = torch.autograd.grad(expected, leaves, gradient)
    output = torch_experts._Experts.apply(rows, probs, counts, *first, *second)
    found = torch.autograd.grad(output, leaves, gradient)
    for got, right in zip((output, *found), (expected, *wanted), strict=True):
        assert got.shape == right.shape
        assert got.dtype == right.dtype
        scale = right.float().abs().max().clamp(min=1e-6)
        assert float((got.float() - right.float()).abs().max() / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("counts", COUNTS)
def test_one_kernel_computes_the_same(counts):
    """torch's grouped GEMM, which a GPU uses, has a CPU form: same shapes, same order of groups."""
    rows, _, first, _ = example(counts, torch.bfloat16)
    gradients = torch.randn(rows.shape[0], 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(
            grouped_gemm(rows, first, counts, kernel=True), grouped_gemm(rows, first, counts, kernel=False)
        )
        together = grouped_weight_gradients(gradients, rows, counts, kernel=True)
        for got, right in zip(together, grouped_weight_gradients(gradients, rows, counts, kernel=False), strict=True):
            torch.testing.assert_close(got, right)
