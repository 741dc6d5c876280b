"""A source as an endless stream of tokens: every token is read once before any token is read twice.

In every epoch the source's tokens are cut into blocks, and a keyed permutation orders the blocks. Samples are windows
over that stream, and a second keyed permutation orders the windows of a group. Permutations are computed, not stored,
so a sample is found in constant time and memory whatever the size of the source.

Example: a source of 110 tokens, blocks of 25, groups of 50, windows of 10 tokens (real sizes are below).

1. Source to stream. 110 // 25 = 4 blocks: tokens 0-24, 25-49, 50-74, and 75-109 (the last one takes the remainder).
   Say the permutation of epoch 0 is 2, 0, 3, 1. Then stream positions 0-24 are tokens 50-74, positions 25-49 are
   tokens 0-24, 50-84 are tokens 75-109, and 85-109 are tokens 25-49. Epoch 1 begins at position 110 in another order.
2. Stream to samples. A group of 50 tokens has 5 windows. Say the permutation of group 0 is 3, 0, 4, 1, 2. Then sample 0
   is window 3: stream positions 30-39, which are tokens 5-14. Sample 5 is the first of group 1, positions 50-99.
3. A change of the window length from 10 to 20 after 7 samples. Group 1 has given 2 of its 5 windows. The other 3
   windows (30 tokens, in the order in which they would have been taken) become the first piece of a new stream
   (``UntakenWindows``), followed by the old stream from position 100 on (``StreamRange``). Windows of 20 tokens are
   then cut from the new stream, so the change neither repeats nor loses a token. A further change nests once more.

Why not shuffle all windows of the source at once: after a change of length the untaken windows would be scattered over
the whole source, and a longer window would find no contiguous room. A group bounds what a change can cut into pieces.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_qwen.data.order.permutation import KeyedPermutation

# A block is long compared with the longest window (131,072 tokens), so that few windows cross from one block into
# another. There are at least 256 in a large source, so that the 64 blocks of a group come from all over it. A group is
# what the second permutation mixes, and at most what a change of length cuts into pieces. Sizes in tokens.
_LEAST_BLOCK, _MOST_BLOCK = 1 << 16, 1 << 20
_BLOCKS_OF_SOURCE, _BLOCKS_OF_GROUP = 256, 64


# Token positions a .. b - 1 of a source, as (a, b).
TokenSpan = tuple[int, int]


@dataclass(frozen=True)
class StreamLayout:
    """Sizes that determine the order of a source. A run keeps the sizes it started with, in its ledger.

    Args:
        total: tokens of the source.
        block: tokens of a block; the last block is longer, by fewer tokens than a block.
        group: tokens of a group.
        key: seed of the run and CRC-32 of the source's name.
    """

    total: int
    block: int
    group: int
    key: tuple[int, int]

    @classmethod
    def of(cls, total: int, *, seed: int, name: str) -> "StreamLayout":
        """The sizes for a source of ``total`` tokens."""
        block = min(max(total // _BLOCKS_OF_SOURCE, _LEAST_BLOCK), _MOST_BLOCK)
        return cls(total, block, min(_BLOCKS_OF_GROUP * block, total), (seed, zlib.crc32(name.encode())))

    def windows(self, seq_length: int) -> int:
        """Number of windows of a group."""
        return max(1, self.group // seq_length)


@dataclass(frozen=True)
class StreamRange:
    """Positions start .. stop - 1 of the endless stream of a source; ``stop`` None: without an end."""

    start: int
    stop: int | None = None


@dataclass(frozen=True)
class UntakenWindows:
    """The windows of a group that were not taken, as a stream, in the order in which they would have been taken.

    Args:
        of: the stream that the group was cut from, exactly as long as the group.
        seq_length: tokens of a window.
        windows: windows of the group.
        key: the rest of the permutation's key, after that of the source: (ordinal, group).
        taken: number of windows that were taken.
        start: first token of this piece, counted over the untaken windows.
        stop: end of this piece, counted in the same way.
    """

    of: tuple["Piece", ...]
    seq_length: int
    windows: int
    key: tuple[int, int]
    taken: int
    start: int
    stop: int


Piece = StreamRange | UntakenWindows
Pieces = tuple[Piece, ...]
WHOLE: Pieces = (StreamRange(0),)


def segments(layout: StreamLayout, pieces: Pieces, start: int, stop: int) -> Iterator[TokenSpan]:
    """Maps positions start .. stop - 1 of a stream to the source.

    Yields:
        Spans [a, b) of token positions in the source, in stream order; adjacent spans are not joined.
    """
    for piece, first, last in _cut(pieces, start, stop):
        position, end = piece.start + first, piece.start + _known(last)
        if isinstance(piece, StreamRange):
            yield from _in_source(layout, position, end)
            continue
        order = KeyedPermutation(piece.windows, *layout.key, *piece.key)
        while position < end:
            window, offset = divmod(position, piece.seq_length)
            length = min(piece.seq_length - offset, end - position)
            begin = order[piece.taken + window] * piece.seq_length + offset
            yield from segments(layout, piece.of, begin, begin + length)
            position += length


def part(pieces: Pieces, start: int, stop: int | None) -> Pieces:
    """Positions start .. stop - 1 of a stream, as a stream."""
    return tuple(
        StreamRange(piece.start + first, None if last is None else piece.start + last)
        if isinstance(piece, StreamRange)
        else UntakenWindows(
            piece.of,
            piece.seq_length,
            piece.windows,
            piece.key,
            piece.taken,
            piece.start + first,
            piece.start + _known(last),
        )
        for piece, first, last in _cut(pieces, start, stop)
    )


def after(layout: StreamLayout, pieces: Pieces, *, seq_length: int, ordinal: int, taken: int) -> Pieces:
    """The rest of a stream after some samples were taken from it, as a stream.

    Args:
        layout: of the source.
        pieces: the stream.
        seq_length: tokens of a sample.
        ordinal: how many times the length had changed before.
        taken: samples taken.
    """
    windows = layout.windows(seq_length)
    group, within = divmod(taken, windows)
    size = windows * seq_length
    if within == 0:
        return part(pieces, group * size, None)
    own = part(pieces, group * size, (group + 1) * size)
    rest = (windows - within) * seq_length
    # Nested: ``own`` may itself hold untaken windows of an earlier change.
    left = UntakenWindows(own, seq_length, windows, (ordinal, group), within, 0, rest)
    return (left, *part(pieces, (group + 1) * size, None))


class Windows:
    """The samples of a stream. Sample ``i`` is a pure function of seed, source, stream, ordinal and ``i``.

    Args:
        layout: of the source.
        pieces: the stream.
        seq_length: tokens of a sample.
        ordinal: how many times the length had changed; part of the key, so that the orders differ.
    """

    def __init__(self, layout: StreamLayout, pieces: Pieces, *, seq_length: int, ordinal: int) -> None:
        self.layout, self.pieces, self.seq_length, self.ordinal = layout, pieces, seq_length, ordinal
        self._windows = layout.windows(seq_length)
        self._order: tuple[int, KeyedPermutation] | None = None

    def __getitem__(self, index: int) -> list[TokenSpan]:
        """Spans [a, b) of the source that make up sample ``index``; adjacent spans are joined."""
        group, within = divmod(index, self._windows)
        if self._order is None or self._order[0] != group:
            self._order = group, KeyedPermutation(self._windows, *self.layout.key, self.ordinal, group)
        start = (group * self._windows + self._order[1][within]) * self.seq_length
        spans: list[TokenSpan] = []
        for begin, end in segments(self.layout, self.pieces, start, start + self.seq_length):
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        return spans


def _cut(pieces: Pieces, start: int, stop: int | None) -> Iterator[tuple[Piece, int, int | None]]:
    """The pieces that hold positions start .. stop - 1, each with the first and last position relative to it."""
    base = 0
    for piece in pieces:
        size = _size(piece)
        if stop is not None and base >= stop:
            return
        if size is None or base + size > start:
            first = max(start - base, 0)
            last = size if stop is None else stop - base if size is None else min(stop - base, size)
            yield piece, first, last
        if size is not None:
            base += size


def _size(piece: Piece) -> int | None:
    return None if piece.stop is None else piece.stop - piece.start


def _known(value: int | None) -> int:
    assert value is not None
    return value


def _in_source(layout: StreamLayout, start: int, stop: int) -> Iterator[TokenSpan]:
    """Maps positions of the endless stream to spans of the source, block by block.

    All blocks have ``block`` tokens except the last one of the source, which has ``longer`` tokens more. Where it is in
    the epoch's order (``place``, by the inverse permutation) decides whether a position is before, in or after it; the
    block is then one division away.
    """
    blocks = max(1, layout.total // layout.block)
    longer = layout.total - blocks * layout.block  # tokens that the last block has more than the others
    position = start
    while position < stop:
        epoch, inside = divmod(position, layout.total)
        order = KeyedPermutation(blocks, *layout.key, -1, epoch)
        place = order.index(blocks - 1)  # position of the longer block in this epoch
        if inside < place * layout.block:
            visit = inside // layout.block
            first = visit * layout.block
        elif inside < (place + 1) * layout.block + longer:
            visit, first = place, place * layout.block
        else:
            visit = (inside - longer) // layout.block
            first = visit * layout.block + longer
        size = layout.block + (longer if visit == place else 0)
        begin = order[visit] * layout.block + inside - first
        length = min(size - (inside - first), stop - position)
        yield begin, begin + length
        position += length


def to_json(pieces: Pieces) -> list[dict[str, Any]]:
    """A stream as JSON, for the ledger in a checkpoint."""
    return [
        {"start": piece.start, "stop": piece.stop}
        if isinstance(piece, StreamRange)
        else {
            "of": to_json(piece.of),
            "seq_length": piece.seq_length,
            "windows": piece.windows,
            "key": list(piece.key),
            "taken": piece.taken,
            "start": piece.start,
            "stop": piece.stop,
        }
        for piece in pieces
    ]


def from_json(saved: Sequence[dict[str, Any]]) -> Pieces:
    """The stream that ``to_json`` wrote."""
    return tuple(
        UntakenWindows(
            from_json(item["of"]),
            item["seq_length"],
            item["windows"],
            (item["key"][0], item["key"][1]),
            item["taken"],
            item["start"],
            item["stop"],
        )
        if "of" in item
        else StreamRange(item["start"], item["stop"])
        for item in saved
    )
