"""A source as an endless stream of tokens, in which nothing comes twice before everything has come once.

Every epoch the source's tokens are cut into blocks, and the blocks follow one another in a keyed order. Samples are
windows over that stream; within a group of windows their order is keyed once more. Both are computed, so a sample is
found in constant time and memory whatever the size of the source.

What is left of a stream when the length of the windows changes is a stream again: the windows of the group under way
that were not taken, and then the rest. So a change loses nothing and repeats nothing.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_qwen.data.order.permutation import KeyedPermutation

# Blocks are long beside the longest windows, so that few windows hold a seam, and many, so that a group of them is
# drawn from everywhere. A group is what a shuffle mixes, and the most that a change of length can cut up.
_LEAST_BLOCK, _MOST_BLOCK = 1 << 16, 1 << 20
_BLOCKS_OF_SOURCE, _BLOCKS_OF_GROUP = 256, 64


@dataclass(frozen=True)
class StreamLayout:
    """Sizes that decide a source's order; a run keeps those it began with.

    Args:
        total: tokens of the source.
        block: tokens of a block; the last of a source is longer, by less than that.
        group: tokens of a group.
        key: seed and source.
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
        """Windows of a group."""
        return max(1, self.group // seq_length)


@dataclass(frozen=True)
class StreamRange:
    """Positions start .. stop - 1 of the endless stream; without an end where ``stop`` is None."""

    start: int
    stop: int | None = None


@dataclass(frozen=True)
class UntakenWindows:
    """Windows of a group that were not taken, one after the other in the order in which they were to be.

    Args:
        of: the stream that the group was cut from, exactly as long as the group.
        seq_length: tokens of a window.
        windows: windows of the group.
        key: what the group's order was keyed with, beside the source.
        taken: windows that were taken.
        start: first token of the untaken ones that belongs to this piece.
        stop: end of this piece.
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


def segments(layout: StreamLayout, pieces: Pieces, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where positions start .. stop - 1 of a stream lie in the source.

    Returns:
        Runs [a, b) of the source's own token positions; neighbours that touch are not joined.
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
    """What is left of a stream once samples have been taken from it.

    Args:
        layout: of the source.
        pieces: the stream.
        seq_length: tokens of a sample.
        ordinal: how many times the stream had been cut anew.
        taken: samples taken.
    """
    windows = layout.windows(seq_length)
    group, within = divmod(taken, windows)
    size = windows * seq_length
    if within == 0:
        return part(pieces, group * size, None)
    own = part(pieces, group * size, (group + 1) * size)
    rest = (windows - within) * seq_length
    left = UntakenWindows(own, seq_length, windows, (ordinal, group), within, 0, rest)
    return (left, *part(pieces, (group + 1) * size, None))


class Windows:
    """Samples of a stream: sample ``i`` is a pure function of seed, source, stream and ``i``.

    Args:
        layout: of the source.
        pieces: the stream.
        seq_length: tokens of a sample.
        ordinal: how many times the stream had been cut anew.
    """

    def __init__(self, layout: StreamLayout, pieces: Pieces, *, seq_length: int, ordinal: int) -> None:
        self.layout, self.pieces, self.seq_length, self.ordinal = layout, pieces, seq_length, ordinal
        self._windows = layout.windows(seq_length)
        self._order: tuple[int, KeyedPermutation] | None = None

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        """Where sample ``index`` lies in the source, as spans [a, b); spans that touch are one."""
        group, within = divmod(index, self._windows)
        if self._order is None or self._order[0] != group:
            self._order = group, KeyedPermutation(self._windows, *self.layout.key, self.ordinal, group)
        start = (group * self._windows + self._order[1][within]) * self.seq_length
        spans: list[tuple[int, int]] = []
        for begin, end in segments(self.layout, self.pieces, start, start + self.seq_length):
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        return spans


def _cut(pieces: Pieces, start: int, stop: int | None) -> Iterator[tuple[Piece, int, int | None]]:
    """The pieces that hold positions start .. stop - 1, each with the bounds inside it."""
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


def _in_source(layout: StreamLayout, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where positions of the endless stream lie in the source."""
    blocks = max(1, layout.total // layout.block)
    longer = layout.total - blocks * layout.block  # by so much is the last block longer
    position = start
    while position < stop:
        epoch, inside = divmod(position, layout.total)
        order = KeyedPermutation(blocks, *layout.key, -1, epoch)
        place = order.index(blocks - 1)  # where the longer block stands
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
    """A stream for a checkpoint's state."""
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
