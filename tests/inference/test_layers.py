"""Parts of inference against the parts of training that they stand for, and what decoding keeps from step to step."""

from types import SimpleNamespace

import pytest
import torch

from megatron_qwen.inference import layers
from megatron_qwen.inference.gathered import GatheredSets, _capacity
from megatron_qwen.inference.kv_cache import CacheShape, KvCache
from megatron_qwen.inference.request import Request, Sampling
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.inference.sequence import Sequence
from megatron_qwen.inference.weight_product import FEW, Products
from megatron_qwen.models.torch_backend import invariant_gemm
from megatron_qwen.models.torch_backend.functions import rms_norm, rotate_qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation(dtype):
    """The bits of the functions that train."""
    x, weight = torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype)
    norm = layers._Norm(SimpleNamespace(weight=weight, eps=1e-6))
    assert torch.equal(norm(x), rms_norm(x, weight, 1e-6)[0])
    mixed, angles = torch.randn(5, 2, 5, 16).to(dtype), torch.randn(5, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, both = layers._Rotation(cos, sin)(mixed)
    expected = rotate_qkv(mixed.unsqueeze(1), cos, sin)
    assert torch.equal(query.flatten(0, 1), expected[0][0])
    assert torch.equal(both, torch.cat(expected[1:]))


@pytest.mark.parametrize("room", [0, 2**30])
@pytest.mark.parametrize(("m", "k", "with_bias"), [(640, 384, True), (384, 1024, False), (50, 24, True)])
def test_products_have_the_bits_of_training(m, k, with_bias, room):
    weight, bias, rows = torch.randn(m, k), torch.randn(m) if with_bias else None, torch.randn(FEW + 36, k)
    products = Products(room)
    product = products(weight, bias)
    expected = invariant_gemm.linear(rows, weight, bias)
    for count in (*range(4, FEW + 2), len(rows)):
        assert torch.equal(product(rows[:count]), expected[:count]), count
    assert products.copied_bytes in ((0,) if room == 0 else (0, weight.nbytes))


def test_weights_are_copied_as_long_as_there_is_room():
    weights = [torch.randn(640, 384) for _ in range(3)]
    all_of_them, two = Products(2**30), Products(2 * weights[0].nbytes)
    for weight in weights:
        all_of_them(weight, None)
        two(weight, None)
    assert two.copied_bytes == min(all_of_them.copied_bytes, 2 * weights[0].nbytes)


def test_lengths_of_slots():
    assert [_capacity(blocks) for blocks in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 24]


def decoding(block: int, start: int) -> Span:
    """A sequence with one block that decodes."""
    sequence = Sequence(Request((1, 2), Sampling(), number=block), 64)
    sequence.blocks = [block]
    return Span(sequence, start, start + 1)


def test_what_decodes_beside_what():
    """Sequences share a set until there is no room; one that shares what another writes now is not copied."""
    sets = GatheredSets(KvCache(CacheShape(1, 2, 16, torch.float32), 8, device=torch.device("cpu")))
    spans = [decoding(block, 5) for block in range(3)]
    (step,), places = sets.enter(spans, 4)
    assert (step.is_all, places) == (True, {0, 1, 2})
    after = [Span(span.sequence, 6, 7) for span in spans]
    assert sets._sets[1].holds(SimpleNamespace(span=after[0]))
    (step,), places = sets.enter([after[0], after[2]], 4)
    assert places == {0, 1}
    shares = decoding(3, 70)
    shares.sequence.blocks = [0, 3]
    assert sets.enter([*after, shares], 4)[1] == {0, 1, 2}
    assert sets.enter([*after[1:], shares], 4)[1] == {0, 1, 2}
    small = GatheredSets(KvCache(CacheShape(1, 2, 16, torch.float32), 3, device=torch.device("cpu")))
    four = [decoding(block, 5) for block in range(4)]
    assert small.enter(four, 4)[1] == {0, 1, 2}, "three blocks hold three slots; the others are gathered"
    assert small.enter([Span(span.sequence, 6, 7) for span in (four[3], *four[:3])], 4)[1] == {1, 2, 3}, "who is there"
    assert small.enter([decoding(0, 300)], 4) == ([], set())
