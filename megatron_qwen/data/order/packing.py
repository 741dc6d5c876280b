"""Whole documents packed into rows of a fixed length with little padding; for long contexts and fine-tuning.

In every epoch a keyed permutation orders blocks of 256 neighbouring documents. Pools of 64 blocks are packed by best
fit decreasing (arXiv 2404.10830, section 3), and the rows of a pool are shuffled. A document longer than a row is
split. Nothing is prepared in advance: a pool is packed when its first row is read.

Unlike a window (``stream.py``), a row is not found in constant time: the number of rows of a pool is known only after
packing it. A cursor therefore points at a pool, and a resume packs only from there on.
"""

import itertools
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.order.permutation import KeyedPermutation
from megatron_qwen.data.order.stream import TokenSpan

# A pool of 16,384 documents is what a first row waits for and what a resume packs again. Blocks of neighbours are read
# with few seeks. Both chosen by hand; they determine the order, so a change needs a new run.
_BLOCK_DOCUMENTS, _BLOCKS_OF_POOL = 256, 64

DocumentStarts = Callable[[int, int], npt.NDArray[np.int64]]
Row = list[TokenSpan]


@dataclass(frozen=True)
class Documents:
    """The documents of a source.

    Args:
        count: documents of the source.
        starts: called with (first, stop); returns the positions [stop - first + 1] of the first tokens of documents
            first .. stop - 1, and of the end of the last.
        key: seed and source.
    """

    count: int
    starts: DocumentStarts
    key: tuple[int, int]

    @classmethod
    def of(
        cls, count: int, starts: Callable[[int, int], npt.NDArray[np.int64]], *, seed: int, name: str
    ) -> "Documents":
        """The documents of a source of that name."""
        return cls(count, starts, (seed, zlib.crc32(name.encode())))


@dataclass(frozen=True)
class UntakenRows:
    """Rows of a pool that were not taken when the length of rows changed.

    Args:
        of: the pool: its number in the endless stream of pools, or the rows left by an earlier change.
        seq_length: of its rows.
        key: the rest of the key of the rows' permutation, after that of the source.
        taken: number of rows that were taken.
    """

    of: "int | UntakenRows"
    seq_length: int
    key: tuple[int, int]
    taken: int


@dataclass(frozen=True)
class Cursor:
    """The position in a packed source: first the rows that earlier changes of length left, then pool after pool.

    Args:
        left: rows that earlier changes left, to be packed again at the present length.
        pool: number of the first pool after that.
        first: number of the first row there, counted from the last change of length.
    """

    left: tuple[UntakenRows, ...] = ()
    pool: int = 0
    first: int = 0


BEGINNING = Cursor()


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing: packs items into rows, the longest first, each into the fullest row that has room.

    Rows are kept by their free space in ``open_rows``, and ``some_left`` has bit r set if a row with r free tokens
    exists. The fullest fitting row is then the lowest set bit from ``length`` up: no search over rows.

    Args:
        lengths: of the items, each at most ``capacity``.
        capacity: of a row.

    Returns:
        The items of each row.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by free space
    some_left = 0  # bit r: some row has r free
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[item]
        fitting = some_left >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                some_left &= ~(1 << left)
            rows[row].append(item)
        else:
            left, row = capacity, len(rows)
            rows.append([item])
        left -= length
        if left:
            open_rows[left].append(row)
            some_left |= 1 << left
    return rows


class PackedRows:
    """The rows of a source. Row ``i`` is a pure function of seed, source, cursor and ``i``.

    To find it, the pools before it are packed; of these only the number of rows is remembered.

    Args:
        documents: what is packed.
        cursor: position in the source when this length began.
        seq_length: of the rows.
        ordinal: how many times the length had changed.
    """

    def __init__(self, documents: Documents, cursor: Cursor, *, seq_length: int, ordinal: int) -> None:
        self.documents, self.cursor, self.seq_length, self.ordinal = documents, cursor, seq_length, ordinal
        self._ends: list[int] = []  # number of rows up to the end of each pool, from the cursor on
        self._lock = threading.RLock()  # a loader thread reads while the main thread asks for the position
        self._held: tuple[int, list[Row]] | None = None

    def __getitem__(self, index: int) -> Row:
        """The spans [a, b) of the source that make up row ``index``, counted from the last change of length."""
        with self._lock:
            pool, within = self._place(index)
            return self._rows(pool)[within]

    def advanced(self, taken: int) -> Cursor:
        """The cursor of the pool of row ``taken``, from which that row is found without packing earlier pools."""
        with self._lock:
            if taken == self.cursor.first:
                return self.cursor
            pool, _ = self._place(taken - 1)
            if taken - self.cursor.first == self._ends[pool]:
                pool += 1
            first = self.cursor.first + (self._ends[pool - 1] if pool else 0)
            return self._at(pool, first)

    def after(self, taken: int) -> Cursor:
        """The cursor for another length after ``taken`` rows: the untaken rows of the current pool come first."""
        with self._lock:
            here = self.advanced(taken)
            within = taken - here.first
            if within == 0:
                return Cursor(here.left, here.pool)
            pool = len(self.cursor.left) - len(here.left) + here.pool - self.cursor.pool
            untaken = UntakenRows(self._source(pool), self.seq_length, self._key(pool), within)
            rest = self._at(pool + 1, 0)
            return Cursor((untaken, *rest.left), rest.pool)

    def _at(self, pool: int, first: int) -> Cursor:
        left = self.cursor.left
        return Cursor(left[pool:], self.cursor.pool + max(pool - len(left), 0), first)

    def _place(self, index: int) -> tuple[int, int]:
        index -= self.cursor.first
        assert index >= 0, "a row before the cursor"
        while not self._ends or index >= self._ends[-1]:
            rows = len(self._rows(len(self._ends)))
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))
        pool = int(np.searchsorted(self._ends, index, side="right"))
        return pool, index - (self._ends[pool - 1] if pool else 0)

    def _source(self, pool: int) -> "int | UntakenRows":
        left = self.cursor.left
        return left[pool] if pool < len(left) else self.cursor.pool + pool - len(left)

    def _key(self, pool: int) -> tuple[int, int]:
        """Key of the order of a pool's rows; it does not depend on the cursor from which the pool is reached."""
        source, left = self._source(pool), len(self.cursor.left)
        return self.ordinal, source if isinstance(source, int) else pool - left

    def _rows(self, pool: int) -> list[Row]:
        if self._held is None or self._held[0] != pool:
            self._held = pool, self._packed(self._source(pool), self.seq_length, self._key(pool))
        return self._held[1]

    def _packed(self, source: "int | UntakenRows", seq_length: int, key: tuple[int, int]) -> list[Row]:
        """The rows of a pool in the order in which they are taken."""
        spans = self._spans(source)
        pieces = [
            (start, min(start + seq_length, end)) for begin, end in spans for start in range(begin, end, seq_length)
        ]
        rows = best_fit([end - start for start, end in pieces], seq_length)
        order = KeyedPermutation(len(rows), *self.documents.key, *key)
        return [[pieces[item] for item in rows[order[index]]] for index in range(len(rows))]

    def _spans(self, source: "int | UntakenRows") -> list[TokenSpan]:
        if isinstance(source, UntakenRows):
            rows = self._packed(source.of, source.seq_length, source.key)
            return [span for row in rows[source.taken :] for span in row]
        blocks = -(-self.documents.count // _BLOCK_DOCUMENTS)
        pools = -(-blocks // _BLOCKS_OF_POOL)
        epoch, number = divmod(source, pools)
        order = KeyedPermutation(blocks, *self.documents.key, -1, epoch)
        spans: list[TokenSpan] = []
        for visit in range(number * _BLOCKS_OF_POOL, min((number + 1) * _BLOCKS_OF_POOL, blocks)):
            first = order[visit] * _BLOCK_DOCUMENTS
            starts = self.documents.starts(first, min(first + _BLOCK_DOCUMENTS, self.documents.count)).tolist()
            spans += [(start, end) for start, end in itertools.pairwise(starts) if end > start]
        return spans


def to_json(cursor: Cursor) -> dict[str, Any]:
    """A cursor as JSON, for the ledger in a checkpoint."""
    return {"left": [_untaken_json(one) for one in cursor.left], "pool": cursor.pool, "first": cursor.first}


def from_json(saved: dict[str, Any]) -> Cursor:
    """The cursor that ``to_json`` wrote."""
    return Cursor(tuple(_untaken(one) for one in saved["left"]), saved["pool"], saved["first"])


def _untaken_json(one: UntakenRows) -> dict[str, Any]:
    inner = one.of if isinstance(one.of, int) else _untaken_json(one.of)
    return {"of": inner, "seq_length": one.seq_length, "key": list(one.key), "taken": one.taken}


def _untaken(saved: dict[str, Any]) -> UntakenRows:
    inner = saved["of"] if isinstance(saved["of"], int) else _untaken(saved["of"])
    return UntakenRows(inner, saved["seq_length"], (saved["key"][0], saved["key"][1]), saved["taken"])
