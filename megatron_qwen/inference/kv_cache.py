"""Keys and values of this rank's layers and heads, in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_qwen.inference.blocks import BLOCK


@dataclass(frozen=True)
class CacheShape:
    """What a rank caches.

    Args:
        layers: of this rank's pipeline stage.
        heads: key heads of this rank.
        head_dim: of a head.
        dtype: of the model.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a position on this rank."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on this rank."""
        return BLOCK * self.token_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes that decoding takes besides for each block, at most (``gathered.py``)."""
        elements = BLOCK * self.layers * self.heads * self.head_dim
        return elements * (torch.float32.itemsize + self.dtype.itemsize)


class KvCache:
    """The cache of a rank.

    Args:
        shape: of what is cached.
        blocks: how many.
        device: where.

    Attributes:
        both: keys and values, [layers, 2, blocks + 1, heads, 64, d]. What only fills a step up is written to the last
            block.
    """

    def __init__(self, shape: CacheShape, blocks: int, *, device: torch.device) -> None:
        self.shape, self.blocks, self.device = shape, blocks, device
        # Zeros: what is masked is multiplied by 0, which a NaN in memory that nobody wrote would survive.
        size = (shape.layers, 2, blocks + 1, shape.heads, BLOCK, shape.head_dim)
        self.both = torch.zeros(size, dtype=shape.dtype, device=device)
        self._rows = [layer.view(-1, shape.head_dim) for layer in self.both]
        self._of_block = torch.arange(2 * shape.heads, device=device)
        self._of_block = self._of_block // shape.heads * (blocks + 1) * shape.heads + self._of_block % shape.heads

    def rows_of(self, places: Sequence[tuple[int, int]], tokens: int) -> torch.Tensor:
        """Where ``write`` puts the tokens of a step, [2 x heads x tokens].

        Args:
            places: block and offset in it, of each token that is not there only to fill the step up.
            tokens: with those.
        """
        heads = self.shape.heads
        first = [block * heads * BLOCK + at for block, at in places]
        first += [self.blocks * heads * BLOCK] * (tokens - len(places))
        return (self._of_block[:, None] * BLOCK + torch.tensor(first, device=self.device)).flatten()

    def write(self, layer: int, rows: torch.Tensor, both: torch.Tensor) -> None:
        """Writes keys and values of a layer, [2, heads, n, d], to ``rows_of``."""
        self._rows[layer].index_copy_(0, rows, both.view(-1, self.shape.head_dim))

    def read(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [items, heads, blocks x 64, d], of the blocks of some items, [items, blocks]."""
        found = self.both[layer][:, tables].transpose(2, 3).flatten(3, 4)
        return found[0], found[1]
