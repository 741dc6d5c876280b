"""Attention by blocks of queries is torch's own, in values and gradients, and nobody sees what comes later."""

import pytest
import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend import causal_attention
from megatron_qwen.models.torch_backend.causal_attention import BlockwiseCausalAttention, pays

SHAPES = [
    # b, heads, kv_heads, queries, keys, d
    (2, 6, 2, 160, 160, 16),
    (1, 4, 4, 64, 64, 8),
    (1, 4, 1, 70, 200, 32),  # context parallelism: a chunk of queries, and the keys up to its end
    (3, 2, 1, 5, 5, 16),
]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    b, heads, groups, queries, keys, d = shape
    torch.manual_seed(0)
    sizes = ((b, heads, queries, d), (b, groups, keys, d), (b, groups, keys, d))
    inputs = [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]
    return inputs, torch.randn(sizes[0], dtype=dtype)


def exact(inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in fp64, by the definition."""
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs)
    repeats = query.shape[1] // key.shape[1]
    wide_key, wide_value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = query @ wide_key.transpose(2, 3) / query.shape[3] ** 0.5
    out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ wide_value
    return [out, *torch.autograd.grad(out, (query, key, value), grad.double())]


def errors(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients(shape, dtype, tolerance):
    inputs, grad = drawn(shape, dtype)
    out = BlockwiseCausalAttention.apply(*inputs, shape[-1] ** -0.5, True)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    assert all(tensor.dtype == dtype for tensor in ours)
    assert max(errors(ours, exact(inputs, grad))) < tolerance


def test_bf16_is_about_as_near_as_torch():
    inputs, grad = drawn((2, 6, 2, 256, 256, 64), torch.bfloat16)
    expected = exact(inputs, grad)
    out = BlockwiseCausalAttention.apply(*inputs, 1 / 8, True)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    ours, peer = (errors([tensor, *torch.autograd.grad(tensor, inputs, grad)], expected) for tensor in (out, theirs))
    assert all(mine < 2 * other for mine, other in zip(ours, peer, strict=True))


def test_nobody_sees_what_comes_later():
    (query, key, value), _ = drawn((1, 2, 1, 150, 150, 16), torch.float32)
    before = BlockwiseCausalAttention.apply(query, key, value, 0.25, True)
    with torch.no_grad():
        key[:, :, 100:] += 1.0
        value[:, :, 100:] += 1.0
    after = BlockwiseCausalAttention.apply(query, key, value, 0.25, True)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.allclose(before[:, :, 100:], after[:, :, 100:])


def test_the_size_of_a_block_changes_nothing(monkeypatch):
    inputs, _ = drawn(SHAPES[0], torch.float32)
    one = BlockwiseCausalAttention.apply(*inputs, 0.25, True)
    monkeypatch.setattr(causal_attention, "BLOCK", 48)
    torch.testing.assert_close(BlockwiseCausalAttention.apply(*inputs, 0.25, True), one, rtol=1e-5, atol=1e-6)


def test_where_it_pays():
    def asked(b: int, heads: int, queries: int, keys: int) -> bool:
        return pays(torch.empty(b, heads, queries, 8), torch.empty(b, heads, keys, 8))

    assert asked(4, 6, 512, 512)
    assert not asked(1, 2, 64, 64)  # too little to do
    assert not asked(4, 6, 2048, 2048)  # scores leave the cache
