"""Every flipped bit changes the hash of a tensor, in both of its forms."""

import random

import pytest
import torch
import xxhash

from megatron_qwen.training.integrity.fingerprint import combined, fingerprints, summed


def plain(tensor: torch.Tensor) -> int:
    return fingerprints([tensor])[0]


def on_device(tensor: torch.Tensor) -> int:
    return int(summed(tensor))


@pytest.mark.parametrize("form", [plain, on_device])
@pytest.mark.parametrize("size", [1, 7, 1024, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_every_flipped_bit_is_seen(form, dtype, size):
    source = random.Random(size)
    tensor = torch.zeros(size, dtype=dtype) if size == 7 else torch.arange(size).to(dtype)
    data, before = tensor.view(torch.uint8), form(tensor)
    assert form(tensor.clone()) == before
    for _ in range(60):
        place, bit = source.randrange(data.numel()), source.randrange(8)
        data[place] ^= 1 << bit
        assert form(tensor) != before, (place, bit)
        data[place] ^= 1 << bit
    assert form(tensor) == before


def test_on_a_cpu_it_is_xxh3_of_the_bytes():
    tensor = torch.randn(100)
    unsigned = xxhash.xxh3_64_intdigest(tensor.numpy().tobytes())
    assert plain(tensor) % 2**64 == unsigned
    assert combined([1, -2]) % 2**64 == xxhash.xxh3_64_intdigest(b"\1" + bytes(7) + b"\xfe" + b"\xff" * 7)


def test_exchanged_rows_change_the_sum():
    tensor = torch.randn(8192)
    exchanged = torch.cat([tensor[4096:], tensor[:4096]])
    assert on_device(tensor) != on_device(exchanged)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_view_at_any_offset_can_be_hashed(start):
    whole = torch.arange(4001, dtype=torch.bfloat16)
    part = whole[start : start + 3000]
    before = plain(part), on_device(part)
    whole[start + 2999] += 64
    assert plain(part) != before[0]
    assert on_device(part) != before[1]
    outside = plain(part), on_device(part)
    whole[start + 3000] = -1
    assert (plain(part), on_device(part)) == outside


def test_no_tensor_has_no_hash():
    assert fingerprints([]) == []
    assert on_device(torch.zeros(0)) == on_device(torch.zeros(0))
