"""Random choices as a pure function of what is chosen: never of batch, rank, layout or time.

A token is drawn by adding Gumbel noise to the logits and taking the largest (Maddison et al. 2014, arXiv 1411.0030).
The noise of a token is a hash of (seed, prompt, sample, position, token), so the same text comes out whoever computes
it beside whatever else, and after a restart.
"""

import torch
import xxhash

_MASK = (1 << 64) - 1
# SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream_key(seed: int, prompt: list[int], sample: int) -> int:
    """Names the random stream of one answer to one prompt, a number of 64 bits.

    Args:
        seed: of the request.
        prompt: token ids.
        sample: which of several answers.
    """
    text = f"{seed}/{sample}/{','.join(map(str, prompt))}"
    return xxhash.xxh3_64_intdigest(text.encode())


def gumbel(key: int, position: int, first: int, count: int, *, device: torch.device) -> torch.Tensor:
    """Noise of the tokens ``first`` .. ``first + count - 1`` at a position, float64 [count].

    Args:
        key: of ``stream_key``.
        position: of the token that is drawn.
        first: id of the first token.
        count: how many.
        device: where the result goes.
    """
    base = _mixed(key + _STEP * (position + 1))
    ids = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    bits = _mixed_tensor(ids * _signed(_STEP) + _signed(base))
    # 52 bits and a half: never 0 nor 1, so both logarithms are finite.
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mixed(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * _FIRST & _MASK
    value = (value ^ (value >> 27)) * _SECOND & _MASK
    return value ^ (value >> 31)


def _mixed_tensor(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shifted(values, 30)) * _signed(_FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(_SECOND)
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """Bits to the right with zeros from the left; torch's int64 brings its sign along."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >= 1 << 63 else value
