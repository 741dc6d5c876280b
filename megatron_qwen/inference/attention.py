"""Causal attention of a step's tokens over the cache.

The training forward attends in blocks of 64 queries, each to the keys up to its end
(models/torch_backend/causal_attention.py). A row of a product does not depend on the other rows there
(models/torch_backend/invariant_gemm.py), so the query of a single new token gets the same bits here: it sees the keys
up to the end of its block of 64 or of a later one, those behind it with a weight of 0.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_qwen.inference.blocks import BLOCK
from megatron_qwen.inference.gathered import GatheredSets
from megatron_qwen.inference.kv_cache import KvCache
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.models.torch_backend import invariant_gemm


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
        sets: of the sequences that decode.
        spans: the tokens, in the order in which the step has them. Tokens that only fill it up come behind them.
        tokens: how many, with those.
    """

    def __init__(self, cache: KvCache, sets: GatheredSets, spans: Sequence[Span], tokens: int) -> None:
        self._cache = cache
        places = [
            (span.sequence.blocks[position // BLOCK], position % BLOCK)
            for span in spans
            for position in range(span.start, span.stop)
        ]
        self._written = cache.rows_of(places, tokens)
        self._gathered, there = sets.enter(spans, tokens)
        self._queries = [_stacked(count, items, cache.device) for (_, count), items in _alike(spans, there).items()]

    def __call__(self, layer: int, query: torch.Tensor, both: torch.Tensor, scale: float) -> torch.Tensor:
        """Writes and attends.

        Args:
            layer: of this rank's stage, from 0.
            query: [key heads, heads of a key head, n, d].
            both: keys and values, [2, key heads, n, d].
            scale: factor on the scores.

        Returns:
            [n, heads x d]; zeros for tokens that only fill the step up.
        """
        self._cache.write(layer, self._written, both)
        if len(self._gathered) == 1 and self._gathered[0].is_all:
            return self._gathered[0].attend(layer, query, both, scale)
        groups, share, count, d = query.shape
        out = query.new_zeros(count, groups * share * d)
        for step in self._gathered:
            out[step.rows] = step.attend(layer, query, both, scale)
        for one in self._queries:
            keys, values = self._cache.read(layer, one.tables)
            out[one.rows] = _attend(query[:, :, one.rows], keys, values, one.mask, scale)
        return out


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """[key heads, share, items, m, d], [items, key heads, L, d] twice, [items, m, L] -> [items, m, heads x d]."""
    groups, share, items, queries, d = query.shape
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    rows = query.permute(2, 0, 1, 3, 4).reshape(items * groups, share * queries, d)
    scores = invariant_gemm.batched(rows.float() * scale, keys.float().transpose(1, 2))
    scores.view(items, groups, share, queries, -1).masked_fill_(mask[:, None, None], float("-inf"))
    weights = torch._softmax(scores, -1, False).to(values.dtype)
    found = invariant_gemm.batched(weights, values)
    shaped = found.reshape(items, groups, share, queries, d).permute(0, 3, 1, 2, 4)
    return shaped.reshape(items, queries, -1)


def _alike(spans: Sequence[Span], but: set[int]) -> dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]]:
    """By (blocks of keys, queries): first row in the step, position of the first query, table of blocks.

    A span is cut where blocks of 64 positions begin, so that every query sees the keys up to the end of its own.

    Args:
        spans: of the step.
        but: places of spans that are left out.
    """
    found: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = defaultdict(list)
    row = 0
    for place, span in enumerate(spans):
        position = span.stop if place in but else span.start
        row += position - span.start
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
