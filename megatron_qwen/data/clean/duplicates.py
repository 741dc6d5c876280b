"""Duplicate documents: the same bytes, or nearly the same words."""

import re
from typing import Any

import xxhash

_WORDS = re.compile(r"\w+")
# Shingles of five words, as in Lee et al. 2022 (arXiv 2107.06499). 128 permutations are datasketch's default: the
# standard error of an estimated similarity s, sqrt(s (1 - s) / 128), is at most 0.044.
_SHINGLE_WORDS = 5
_PERMUTATIONS = 128


class ExactDuplicates:
    """Finds exact duplicates by a 16-byte hash of every document."""

    name = "exact duplicates"

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, digest: bytes) -> bool:
        """Whether no earlier document had this digest; remembers it."""
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


class NearDuplicates:
    """MinHash signatures in a locality-sensitive index (Broder 1997), by datasketch.

    The index is in memory: about 3 KB per kept document.

    Args:
        threshold: a document is dropped if the Jaccard similarity of its five-word shingles to a kept document is this
            or more.
    """

    name = "near duplicates"

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._signatures: dict[int, Any] = {}
        self._threshold, self._kept = threshold, 0

    def is_new(self, own: Any) -> bool:
        """Whether no kept document is as similar as the threshold; if so, remembers the ``signature``."""
        if any(own.jaccard(self._signatures[key]) >= self._threshold for key in self._index.query(own)):
            return False
        self._index.insert(self._kept, own)
        self._signatures[self._kept] = own
        self._kept += 1
        return True


def digest(text: str) -> bytes:
    """The hash of a text without surrounding white space; equal for exact duplicates."""
    return xxhash.xxh3_128_digest(text.strip().encode())


def signature(text: str) -> Any:
    """MinHash of a text's shingles."""
    from datasketch import LeanMinHash, MinHash

    words = _WORDS.findall(text.lower())
    last = max(len(words) - _SHINGLE_WORDS + 1, 1)
    shingles = {" ".join(words[start : start + _SHINGLE_WORDS]).encode() for start in range(last)}
    made = MinHash(num_perm=_PERMUTATIONS)
    made.update_batch(list(shingles))
    return LeanMinHash(made)
