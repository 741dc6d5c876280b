"""Codes of 4 or 8 bits in 32-bit words, the first code in the lowest bits."""

import torch

_WORD_BITS = 32


def codes_of_a_word(bits: int) -> int:
    """How many codes a word holds."""
    return _WORD_BITS // bits


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs along the last dimension.

    Args:
        codes: uint8 [..., n], n a multiple of 32 / bits.
        bits: of a code, 4 or 8.

    Returns:
        int32 [..., n * bits / 32].
    """
    assert bits in (4, 8), bits
    packed = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    # The bytes of a word in memory are those of its lowest bits first: the machine is little-endian, as safetensors is.
    # As one row: of a dimension of length 1 the stride may be anything, which a view in another format refuses.
    return packed.reshape(-1).view(torch.int32).view(*packed.shape[:-1], -1)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [..., n] as uint8 [..., n * 32 / bits]."""
    packed = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
