"""Keys and values of the sequences that decode, laid out for one batched product, kept from step to step.

Blocks of the cache are anywhere. To gather a sequence's blocks at every step would read and write all that attention
reads. So a sequence that decodes has its keys and values a second time, in a slot of a set whose slots are equally
long, and every step adds one position. A set takes sequences of similar length. All sets together hold as many
positions as the cache; sequences that find no room are gathered step by step.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_qwen.inference.blocks import BLOCK, blocks_of
from megatron_qwen.inference.kv_cache import KvCache
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.inference.sequence import Sequence as Answered
from megatron_qwen.models.torch_backend import invariant_gemm


@dataclass(frozen=True)
class Single:
    """A span of one token.

    Args:
        row: of the token in the step.
        span: the token.
    """

    row: int
    span: Span


class _Set:
    """Slots of one length.

    Args:
        cache: whose keys and values it has.
        blocks: positions of a slot, in blocks of 64.
        slots: how many.
    """

    def __init__(self, cache: KvCache, blocks: int, slots: int) -> None:
        self.blocks, self.slots, self._cache = blocks, slots, cache
        # Tensors of a layer are apart, so that a set which grows holds no more than one of them twice.
        self._layers = [_LayerOfSet(*self._zeros(slots)) for _ in range(cache.shape.layers)]
        self._slot_of: dict[Answered, int] = {}
        self._next: dict[Answered, int] = {}  # position that is written next
        self._free = list(reversed(range(slots)))

    def _zeros(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        shape, device, length = self._cache.shape, self._cache.device, self.blocks * BLOCK
        keys = torch.zeros(slots, shape.heads, shape.head_dim, length, dtype=torch.float32, device=device)
        return keys, torch.zeros(slots, shape.heads, length, shape.head_dim, dtype=shape.dtype, device=device)

    @property
    def size(self) -> int:
        """Blocks that it takes."""
        return self.blocks * self.slots

    def grow(self, slots: int) -> None:
        """Takes more slots; what is there stays."""
        for number, old in enumerate(self._layers):
            both = zip(old.whole(), self._zeros(slots - self.slots), strict=True)
            self._layers[number] = _LayerOfSet(*(torch.cat(parts) for parts in both))
        self._free = [*reversed(range(self.slots, slots)), *self._free]
        self.slots = slots

    def holds(self, one: Single) -> bool:
        """Whether all before a token is here."""
        return self._next.get(one.span.sequence) == one.span.start

    def enter(self, singles: Sequence[Single], tokens: int | None) -> "GatheredStep":
        """Makes these its sequences, and plans their step.

        Args:
            singles: of the step.
            tokens: of the whole step, with those that fill it up, where all others are of this set; else None.
        """
        present = {one.span.sequence for one in singles}
        for gone in [sequence for sequence in self._slot_of if sequence not in present]:
            self._free.append(self._slot_of.pop(gone))
            del self._next[gone]
        for one in singles:
            if not self.holds(one):
                self._load(one.span.sequence, one.span.start)
            self._next[one.span.sequence] = one.span.stop
        slots = [self._slot_of[one.span.sequence] for one in singles]
        return GatheredStep(self._layers, singles, slots, tokens)

    def _load(self, sequence: Answered, stop: int) -> None:
        if sequence not in self._slot_of:
            self._slot_of[sequence] = self._free.pop()
        if stop:
            table = torch.tensor(sequence.blocks[: blocks_of(stop)], device=self._cache.device)
            slot = self._slot_of[sequence]
            for layer, cached in zip(self._layers, self._cache.both, strict=True):
                keys, values = layer.whole()
                found = cached[:, table].transpose(1, 2).flatten(2, 3)
                keys[slot, :, :, : found.shape[2]] = found[0].transpose(1, 2)
                values[slot, :, : found.shape[2]] = found[1]


class _LayerOfSet:
    """Views of a layer's keys, [slots, heads, d, L], and values, [slots, heads, L, d].

    Keys lie as they are multiplied, and in fp32, as scores are computed (``invariant_gemm``).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.slots, self.heads, self.length, self.d = values.shape
        self.keys, self.values = keys.flatten(0, 1), values.flatten(0, 1)
        self._key_elements, self._value_rows = keys.view(-1), values.view(-1, self.d)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [slots, heads, d, L] and values [slots, heads, L, d]."""
        return self.keys.unflatten(0, (self.slots, self.heads)), self.values.unflatten(0, (self.slots, self.heads))

    def write(self, elements: torch.Tensor, rows: torch.Tensor, both: torch.Tensor) -> None:
        """Writes keys and values, [2, heads, n, d]: keys to elements, [heads x n x d], values to rows, [heads x n]."""
        self._key_elements.index_copy_(0, elements, both[0].reshape(-1).to(self.keys.dtype))
        self._value_rows.index_copy_(0, rows, both[1].reshape(-1, self.d))

    def scores(self, queries: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Of queries [slots x heads, n, d], plus a bias [slots x heads, 1, L]."""
        if invariant_gemm.is_one(queries, self.length):
            return torch.baddbmm(bias, queries, self.keys)
        return invariant_gemm.batched(queries, self.keys).add_(bias)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums of values, [slots x heads, n, d]."""
        if invariant_gemm.is_one(weights, self.d):
            return torch.bmm(weights, self.values)
        return invariant_gemm.batched(weights, self.values)


class GatheredStep:
    """Attention of one step's tokens over a set, layer by layer.

    Args:
        layers: of the set.
        singles: the tokens.
        slots: of each.
        tokens: of the whole step, with those that fill it up, where all others are of this set; else None.

    Attributes:
        is_all: whether there are no other tokens.
        rows: of the tokens in the step.
    """

    def __init__(
        self, layers: Sequence[_LayerOfSet], singles: Sequence[Single], slots: Sequence[int], tokens: int | None
    ) -> None:
        self._layers, first = layers, layers[0]
        device, count = first.keys.device, first.slots
        rows, positions = [one.row for one in singles], [one.span.start for one in singles]
        self.is_all, self._count = tokens is not None, len(rows)
        self._filling = 0 if tokens is None else tokens - len(rows)
        row_of, last = [0] * count, [0] * count  # free slots compute with some token, and nobody reads it
        for slot, row, position in zip(slots, rows, positions, strict=True):
            row_of[slot], last[slot] = row, position
        behind = torch.arange(first.length, device=device) > torch.tensor(last, device=device)[:, None]
        self._bias = torch.zeros(behind.shape, device=device).masked_fill_(behind, float("-inf"))
        self._bias = self._bias.repeat_interleave(first.heads, dim=0)[:, None]
        # Values lie [slot, head, position, channel], keys [slot, head, channel, position].
        head = torch.arange(first.heads)[:, None] + first.heads * torch.tensor(slots)
        at = torch.tensor(positions)
        self._value_rows = (head * first.length + at).flatten().to(device)
        channel = torch.arange(first.d) * first.length
        self._key_elements = ((head * first.d * first.length + at)[:, :, None] + channel).flatten().to(device)
        self.rows = torch.tensor(rows, device=device)
        in_order = self.is_all and list(slots) == list(range(len(slots)))
        self._row_of = None if in_order else torch.tensor(row_of, device=device)
        self._slot_of = None if in_order else torch.tensor(slots, device=device)
        self._queries: torch.Tensor | None = None

    def attend(self, layer: int, query: torch.Tensor, both: torch.Tensor, scale: float) -> torch.Tensor:
        """Writes a position and attends to all up to it.

        Args:
            layer: of this rank's stage, from 0.
            query: [key heads, heads of a key head, n, d] of the step's tokens, which are chosen from by ``rows``.
            both: keys and values, [2, key heads, n, d].
            scale: factor on the scores.

        Returns:
            [tokens of this set, heads x d], and zeros for those that fill the step up.
        """
        kept, share = self._layers[layer], query.shape[1]
        new = both[:, :, : self._count] if self.is_all else both.index_select(2, self.rows)
        kept.write(self._key_elements, self._value_rows, new)
        query = query.permute(2, 0, 1, 3)
        query = query[: self._count] if self._row_of is None else query.index_select(0, self._row_of)
        if self._queries is None:  # a product needs some rows for its bits; those behind the queries stay 0
            here = invariant_gemm.is_batched_here(kept.keys)
            rows = _rows(share, kept.d, kept.length) if here else share
            self._queries = torch.zeros(kept.slots, kept.heads, rows, kept.d, device=query.device)
        torch.mul(query.float(), scale, out=self._queries[: len(query), :, :share])
        scores = kept.scores(self._queries.flatten(0, 1), self._bias)
        found = kept.weighted(torch._softmax(scores, -1, False).to(kept.values.dtype))
        out = found.view(kept.slots, kept.heads, -1, kept.d)[: len(query), :, :share].reshape(len(query), -1)
        if self._slot_of is not None:
            out = out.index_select(0, self._slot_of)
        return F.pad(out, (0, 0, 0, self._filling)) if self._filling else out


def _rows(share: int, d: int, length: int) -> int:
    """Rows of both products that give the bits of training's: of `share` queries a key head, in slots of a length."""
    products = [(d, length), *((seen, d) for seen in range(BLOCK, min(length, invariant_gemm.INNER) + 1, BLOCK))]
    rows = share
    while (more := max(invariant_gemm.batched_rows(rows, *one) for one in products)) > rows:
        rows = more
    return rows


class GatheredSets:
    """The sets of a cache."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._sets: dict[int, _Set] = {}

    def enter(self, spans: Sequence[Span], tokens: int) -> tuple[list[GatheredStep], set[int]]:
        """Plans a step: what attends over sets, and which spans of the step do, by their place in it.

        Args:
            spans: of the step.
            tokens: of the step, with those that fill it up.
        """
        singles: dict[int, list[tuple[int, Single]]] = defaultdict(list)
        writer = {block: span.sequence for span in spans for block in _written(span)}
        row = 0
        for place, span in enumerate(spans):
            if span.stop - span.start == 1:
                size = _capacity(blocks_of(span.stop))
                one = Single(row, span)
                # What another sequence writes in this step, and this one shares, cannot be copied before it.
                if all(writer.get(block, span.sequence) is span.sequence for block in span.sequence.blocks):
                    singles[size].append((place, one))
            row += span.stop - span.start
        for gone in self._sets.keys() - singles.keys():
            del self._sets[gone]
        steps, places = [], set()
        for size, found in singles.items():
            kept = self._set(size, len(found))
            if kept is not None:
                found.sort(key=lambda one: (not kept.holds(one[1]), one[0]))
                found = sorted(found[: kept.slots], key=lambda one: one[0])
                alone = len(found) == len(spans)
                steps.append(kept.enter([one for _, one in found], tokens if alone else None))
                places |= {place for place, _ in found}
        return steps, places

    def _set(self, size: int, wanted: int) -> _Set | None:
        """The set of a size, with enough slots or as many as find room, and not too many; None where none does."""
        least = 2 if self._cache.shape.heads == 1 else 1  # a batched product of one is computed by other code
        room = (self._cache.blocks - sum(one.size for number, one in self._sets.items() if number != size)) // size
        slots = min(room, max(wanted, least))
        kept = self._sets.get(size)
        if kept is not None and slots <= kept.slots <= min(room, 2 * slots + 2):
            return kept
        # Free slots are computed as well, so a set has no more than it needs when it grows.
        if kept is not None and slots > kept.slots:
            kept.grow(slots)
            return kept
        self._sets.pop(size, None)
        del kept  # before its successor takes memory
        if slots < least:
            return None
        self._sets[size] = _Set(self._cache, size, slots)
        return self._sets[size]


def _written(span: Span) -> Iterator[int]:
    yield from span.sequence.blocks[span.start // BLOCK : blocks_of(span.stop)]


def _capacity(blocks: int) -> int:
    """Length of the slots that take a sequence of so many blocks: 1, 2, 3, 4, 6, 8, 12, 16, 24 ... blocks."""
    size = 1
    while size < blocks:
        if size % 2 == 0 and 3 * size // 2 >= blocks:
            return 3 * size // 2
        size *= 2
    return size
