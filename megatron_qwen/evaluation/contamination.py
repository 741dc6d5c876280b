"""What of a test the training data has: the longest run of tokens of every item in what a run has read.

The tokens of all items' n-grams are hashed, and the run's samples are read once (Brown et al. 2020, arXiv 2005.14165,
appendix C, look for 13-grams of words; the Qwen2.5 report, arXiv 2412.15115, for 13 tokens). A hash only proposes: what
counts was compared token by token.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NGRAM = 13
# N-grams in more than so many items are the words of the task ("Answer the following question ..."), not of an item.
_COMMON_ITEMS, _COMMON_SHARE = 10, 0.01
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_MIX = np.uint64(0xD6E8FEB86659FD93)
_FILTER_BITS = 22

Tokens = np.ndarray[Any, np.dtype[np.int64]]
_Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Overlap:
    """The longest common run of tokens of an item and the training data.

    Args:
        tokens: its length.
        source: that has it; the first in the run's order among equally long ones.
        sample: number of the sample in the run.
        position: of its first token in the sample.
        start: of its first token in the item.
    """

    tokens: int
    source: str
    sample: int
    position: int
    start: int


class TestIndex:
    """The n-grams of a test's items.

    Args:
        items: token ids of each.
        tests: to which test each belongs; None: to one.
        ngram: length of the runs that are looked for.

    Attributes:
        common: n-grams that are left out because they are in many items.
    """

    __test__ = False  # not a test of pytest

    def __init__(
        self, items: Sequence[Sequence[int]], *, tests: Sequence[str] | None = None, ngram: int = NGRAM
    ) -> None:
        self.items, self.ngram = [np.asarray(item, dtype=np.int64) for item in items], ngram
        hashes, owners, starts = [], [], []
        for number, item in enumerate(self.items):
            found = _hashes(item, ngram)
            hashes.append(found)
            owners.append(np.full(len(found), number))
            starts.append(np.arange(len(found)))
        every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        owner, start = (np.concatenate(part) if part else np.zeros(0, np.int64) for part in (owners, starts))
        kept = np.ones(len(every), dtype=bool)
        self.common = 0
        of = np.array(tests if tests is not None else [""] * len(items), dtype=object)
        for test in dict.fromkeys(of.tolist()):
            own = (of == test)[owner] if len(owner) else kept
            frequent = _frequent(every[own], owner[own], int((of == test).sum()))
            kept &= ~(own & np.isin(every, frequent))
            self.common += len(frequent)
        order = np.argsort(every[kept], kind="stable")
        self._hashes: _Hashes = every[kept][order]
        self._owners, self._starts = owner[kept][order], start[kept][order]
        # Whether the n-gram that begins one token earlier in the item is looked for, too.
        self._follows = np.concatenate(([False], kept[:-1]))[kept][order] & (self._starts > 0) if len(every) else kept
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[_slot(self._hashes)] = True

    def matches(self, tokens: Tokens) -> Iterator[tuple[int, int, int, int]]:
        """Runs that a sample and an item have in common and that go on in neither direction.

        Args:
            tokens: of the sample.

        Yields:
            Item, first token in it, first token in the sample, and length.
        """
        hashes = _hashes(tokens, self.ngram)
        places = np.flatnonzero(self._filter[_slot(hashes)])
        if not len(places):
            return
        wanted = hashes[places]
        first = np.searchsorted(self._hashes, wanted)
        last = np.searchsorted(self._hashes, wanted, side="right")
        for place, begin, end in zip(places.tolist(), first.tolist(), last.tolist(), strict=True):
            for entry in range(begin, end):
                number, start = int(self._owners[entry]), int(self._starts[entry])
                item = self.items[number]
                if self._follows[entry] and place and item[start - 1] == tokens[place - 1]:
                    continue  # found where the run began
                length = _common_length(item[start:], tokens[place:])
                if length >= self.ngram:
                    before = _common_length(item[:start][::-1], tokens[:place][::-1])
                    yield number, start - before, place - before, length + before


def longest(index: TestIndex, samples: Iterable[tuple[int, str, Tokens]]) -> dict[int, Overlap]:
    """The longest run of every item that has one.

    Args:
        index: of the test.
        samples: number in the run, source, and tokens as the model has read them, in the run's order.
    """
    found: dict[int, Overlap] = {}
    for sample, source, tokens in samples:
        for number, start, place, length in index.matches(tokens):
            if number not in found or length > found[number].tokens:
                found[number] = Overlap(length, source, sample, place, start)
    return found


def merged(parts: Iterable[dict[int, Overlap]]) -> dict[int, Overlap]:
    """Of parts of the samples, the longest; of equally long ones that of the earliest sample."""
    found: dict[int, Overlap] = {}
    for part in parts:
        for number, one in part.items():
            before = found.get(number)
            if before is None or (-one.tokens, one.sample) < (-before.tokens, before.sample):
                found[number] = one
    return found


def _frequent(hashes: _Hashes, owners: Tokens, items: int) -> _Hashes:
    """Hashes that are in many of a test's items."""
    limit = max(_COMMON_ITEMS, _COMMON_SHARE * items)
    once = np.unique(np.stack((hashes.view(np.int64), owners)), axis=1)[0].view(np.uint64)
    return np.array([value for value, count in Counter(once.tolist()).items() if count > limit], dtype=np.uint64)


def _hashes(tokens: Tokens, ngram: int) -> _Hashes:
    """Of every n-gram: a polynomial of its tokens modulo 2**64, from differences of sums."""
    if len(tokens) < ngram:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(len(tokens))
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    # One more than the id: a run of zeros would be the same whatever its length.
    np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    return (sums[ngram:] - sums[:-ngram]) * inverses[: len(tokens) - ngram + 1]


_kept: dict[str, _Hashes] = {}


def _powers(count: int) -> tuple[_Hashes, _Hashes]:
    if len(_kept.get("powers", ())) < count:
        for name, base in (("powers", _BASE), ("inverses", _INVERSE)):
            factors = np.full(count, base, dtype=np.uint64)
            factors[0] = 1
            _kept[name] = np.multiply.accumulate(factors)
    return _kept["powers"][:count], _kept["inverses"][:count]


def _slot(hashes: _Hashes) -> Any:
    """Places in the filter: the upper bits of a mix, because the low bits of a polynomial depend on low bits alone."""
    return ((hashes ^ (hashes >> np.uint64(32))) * _MIX >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _common_length(first: Tokens, second: Tokens) -> int:
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
