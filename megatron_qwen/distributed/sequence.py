"""Which part of a sequence a context-parallel rank holds.

The sequence is cut into 2 x CP chunks and rank r holds chunks r and 2 CP - 1 - r, so that every rank does the
same share of the causal triangle.
"""

import torch


def slice_for_rank(tensor: torch.Tensor, *, rank: int, size: int, dim: int = 1) -> torch.Tensor:
    """The two chunks of ``tensor`` that a rank holds, along ``dim``."""
    if size == 1:
        return tensor
    chunks = tensor.chunk(2 * size, dim=dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=dim)


def in_global_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """Chunks gathered rank by rank along the first dimension, put back in the order of the sequence.

    Args:
        gathered: [s, ...] as rank 0's two chunks, rank 1's two chunks and so on.
        size: context parallel size.
    """
    chunks = gathered.chunk(2 * size)
    order = [2 * index if index < size else 2 * (2 * size - 1 - index) + 1 for index in range(2 * size)]
    return torch.cat([chunks[position] for position in order])
