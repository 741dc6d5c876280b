"""A 64-bit hash of a tensor's bytes, computed where the tensor is."""

from collections.abc import Sequence

import torch
import xxhash

# Words summed into one before positions are mixed in. A row is one block of a reduction kernel. Chosen by hand.
_ROW = 1024
# Odd 64-bit constants of splitmix64 (Steele, Lea, Flood 2014), as signed integers.
_STEP, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def fingerprints(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Hashes of contiguous tensors, as signed 64-bit integers.

    On a CPU it is xxh3. On a GPU it is a sum of words that is computed there (``summed``), since copying the tensors to
    the host would take longer than a step. The values of the two kinds are not comparable.
    """
    if not tensors:
        return []
    if tensors[0].device.type == "cpu":
        return [_signed(xxhash.xxh3_64_intdigest(memoryview(_bytes(tensor).numpy()))) for tensor in tensors]
    return [int(value) for value in torch.stack([summed(tensor) for tensor in tensors]).tolist()]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The hash on any device, a scalar int64 tensor.

    Rows of words are summed modulo 2**64, so the order in which a kernel adds does not matter and a flipped bit always
    changes its row's sum. The sums are then mixed with their positions (splitmix64), so that exchanged rows change the
    hash; two words exchanged within a row do not.
    """
    flat = _bytes(tensor)
    # A view as wider words needs an address and a size that are multiples of theirs.
    width = next(size for size in _WORDS if flat.numel() % size == 0 and flat.storage_offset() % size == 0)
    words = flat.view(_WORDS[width])
    whole = words.numel() // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW).sum(dim=1, dtype=torch.int64)
    sums = torch.cat([rows, words[whole:].sum(dtype=torch.int64).view(1)])
    mixed = (sums + torch.arange(1, sums.numel() + 1, device=sums.device) * _STEP) * _MIX
    return ((mixed ^ (mixed >> 31)) * _STEP).sum()


def combined(values: Sequence[int]) -> int:
    """One hash of several."""
    return _signed(xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little", signed=True) for value in values)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
