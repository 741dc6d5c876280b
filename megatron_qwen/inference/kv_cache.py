"""Keys and values of this rank's layers and heads, in blocks, and causal attention over them.

The training forward attends in blocks of 64 queries, each to the keys up to its end
(models/torch_backend/causal_attention.py). A row of a GEMM does not depend on the other rows, as long as there are a
few, so the query of a single new token gets the same bits here: it sees the keys up to the end of its block of 64,
those behind it with a weight of 0, and there are never fewer rows than ``INVARIANT_ROWS``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_qwen.inference.blocks import BLOCK
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.models.torch_backend.dense_gemm import INVARIANT_ROWS


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


class KvCache:
    """The cache of a rank.

    Args:
        shape: of what is cached.
        blocks: how many.
        device: where.
    """

    def __init__(self, shape: CacheShape, blocks: int, *, device: torch.device) -> None:
        # Zeros: what is masked is multiplied by 0, which a NaN in memory that nobody wrote would survive.
        size = (shape.layers, blocks, shape.heads, BLOCK, shape.head_dim)
        self.keys, self.values = (torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2))


@dataclass(frozen=True)
class _Queries:
    """Queries of several sequences that are alike: so many, and keys in so many blocks.

    Args:
        rows: of the step's tokens, [items, queries].
        tables: blocks with the keys of each, [items, blocks].
        mask: bool [items, queries, keys], true where a key is behind the query.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    mask: torch.Tensor


class CachedAttention:
    """Attention of one step's tokens: every layer writes their keys and values and attends to all before them.

    Args:
        cache: of this rank.
        spans: the tokens, in the order in which the step has them. Tokens that only fill it up come behind them.
    """

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys.device
        blocks, offsets = [], []
        for span in spans:
            positions = range(span.start, span.stop)
            blocks += [span.sequence.blocks[position // BLOCK] for position in positions]
            offsets += [position % BLOCK for position in positions]
        self._blocks = torch.tensor(blocks, dtype=torch.int64, device=device)
        self._offsets = torch.tensor(offsets, dtype=torch.int64, device=device)
        self._queries = [_stacked(count, items, device) for (_, count), items in _alike(spans).items()]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Writes and attends.

        Args:
            layer: of this rank's stage, from 0.
            query: [1, heads, n, d].
            key: [1, key heads, n, d].
            value: as ``key``.
            scale: factor on the scores.

        Returns:
            [1, heads, n, d]; zeros for tokens that only fill the step up.
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        count = len(self._blocks)
        keys[self._blocks, :, self._offsets] = key[0, :, :count].transpose(0, 1)
        values[self._blocks, :, self._offsets] = value[0, :, :count].transpose(0, 1)
        out = query.new_zeros(query.shape)
        for one in self._queries:
            out[0][:, one.rows] = _attend(query[0][:, one.rows], keys[one.tables], values[one.tables], one.mask, scale)
        return out


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """[heads, items, m, d], [items, blocks, key heads, 64, d] twice, [items, m, L] -> [heads, items, m, d]."""
    heads, items, queries, d = query.shape
    groups = keys.shape[2]
    keys, values = (part.transpose(1, 2).reshape(items * groups, -1, d) for part in (keys, values))
    # [items, key heads, heads of a key head x queries, d]
    rows = query.view(groups, heads // groups, items, queries, d).permute(2, 0, 1, 3, 4).reshape(items * groups, -1, d)
    count = rows.shape[1]
    rows = rows.float() * scale
    if count < INVARIANT_ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, INVARIANT_ROWS - count))
    scores = torch.bmm(rows, keys.float().transpose(1, 2))
    by_query = scores[:, :count].view(items, groups, heads // groups, queries, -1)
    by_query.masked_fill_(mask[:, None, None], float("-inf"))
    weights = torch._softmax(scores, -1, False).to(values.dtype)
    found = torch.bmm(weights, values)[:, :count]
    return (
        found.view(items, groups, heads // groups, queries, d).permute(1, 2, 0, 3, 4).reshape(heads, items, queries, d)
    )


def _alike(spans: Sequence[Span]) -> dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]]:
    """By (blocks of keys, queries): first row in the step, position of the first query, table of blocks.

    A span is cut where blocks of 64 positions begin, so that every query sees the keys up to the end of its own.
    """
    found: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = defaultdict(list)
    row = 0
    for span in spans:
        position = span.start
        while position < span.stop:
            stop = min(span.stop, (position // BLOCK + 1) * BLOCK)
            seen = position // BLOCK + 1
            found[seen, stop - position].append((row, position, span.sequence.blocks[:seen]))
            row += stop - position
            position = stop
    return found


def _stacked(queries: int, items: list[tuple[int, int, Sequence[int]]], device: torch.device) -> _Queries:
    step = torch.arange(queries, device=device)
    rows, positions = (torch.tensor([item[part] for item in items], device=device)[:, None] + step for part in range(2))
    tables = torch.tensor([list(table) for _, _, table in items], device=device)
    keys = torch.arange(tables.shape[1] * BLOCK, device=device)
    return _Queries(rows, tables, keys > positions[:, :, None])
