"""A permutation of 0 .. n-1 that is computed, not stored: item i is found in constant time and memory.

A balanced Feistel network over the smallest even number of bits that holds n, with cycle walking (Black and
Rogaway 2002) back into the range. Four rounds of a 64-bit mixer make it a shuffle good enough for sample order, more
of them where a half has few bits; it is not a cipher.
"""

_MASK = (1 << 64) - 1
# Four rounds are the least that make a Feistel network indistinguishable from a random permutation (Luby and Rackoff
# 1988), but not with halves of few bits. Chi-square of 16 positions by items: halves of 2 bits give 470 with 4 rounds,
# 178 with 16 (156 degrees of freedom, 20,000 keys); halves of 4 bits give 232 with 4 rounds (240 degrees of freedom). 6
# leaves room.
_ROUNDS, _ROUNDS_OF_SMALL, _SMALL_BITS = 4, 16, 6


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class KeyedPermutation:
    """A shuffle of ``size`` items chosen by ``key``.

    Args:
        size: number of items, at least 1.
        key: any integers; different keys give unrelated orders.
    """

    def __init__(self, size: int, *key: int) -> None:
        assert size >= 1
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        state = 0x9E3779B97F4A7C15
        for part in key:
            state = _mix((state + part * 0x9E3779B97F4A7C15) & _MASK)
        rounds = _ROUNDS if self._half >= _SMALL_BITS else _ROUNDS_OF_SMALL
        self._keys = [_mix((state + index * 0x9E3779B97F4A7C15) & _MASK) for index in range(1, rounds + 1)]

    def __getitem__(self, index: int) -> int:
        """The item at position ``index``."""
        assert 0 <= index < self.size
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def index(self, item: int) -> int:
        """The position of an item: the inverse of ``[]``."""
        assert 0 <= item < self.size
        while True:
            item = self._decrypt(item)
            if item < self.size:
                return item

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix((right + key) & _MASK) & self._mask)
        return left << self._half | right

    def _decrypt(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in reversed(self._keys):
            left, right = right ^ (_mix((left + key) & _MASK) & self._mask), left
        return left << self._half | right
