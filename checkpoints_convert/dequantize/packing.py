"""Codes of a few bits in words of 32."""

import torch

# AWQ's gemm layout: place k of a word holds column AWQ_ORDER[k] of the eight (autoawq's packing for its GEMM kernel).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = 32


def unpack(words: torch.Tensor, bits: int, *, dim: int) -> torch.Tensor:
    """Codes, low bits first.

    Args:
        words: int32 [n, m].
        bits: of a code; a divisor of 32.
        dim: dimension along which codes were packed, 0 or 1.

    Returns:
        uint8 [n * 32 / bits, m] or [n, m * 32 / bits].
    """
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    if dim == 0:
        codes = (words[:, None, :] >> shifts[None, :, None]) & mask
        return codes.to(torch.uint8).flatten(0, 1)
    codes = (words[:, :, None] >> shifts[None, None, :]) & mask
    return codes.to(torch.uint8).flatten(1, 2)


def in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, m] that were unpacked from words of eight, in the order of the columns they stand for."""
    place = torch.tensor(AWQ_ORDER).argsort()
    words: torch.Tensor = codes.unflatten(1, (-1, len(AWQ_ORDER)))
    return words[:, :, place].flatten(1)
