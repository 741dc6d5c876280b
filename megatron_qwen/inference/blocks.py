"""Blocks of the KV cache: who holds which, and which prompts share one.

A block has the keys and values of 64 positions of a sequence, in all layers of this rank. All ranks of a layout decide
alike, because it depends on the sequences alone. Blocks that nobody holds keep their content until they are needed: a
later prompt that begins with the same tokens takes them over.
"""

from collections import OrderedDict

import xxhash

from megatron_qwen.estimate import cpu_attention

# Positions; the training forward attends in blocks of as many queries.
BLOCK = cpu_attention.BLOCK


def blocks_of(positions: int) -> int:
    """Blocks that positions 0 .. ``positions - 1`` take."""
    return -(-positions // BLOCK)


def chain(before: int, tokens: list[int]) -> int:
    """Names a full block by all tokens up to its end.

    Args:
        before: the name of the block before it; 0 of the first.
        tokens: of the block.
    """
    return xxhash.xxh3_64_intdigest(f"{before}/{','.join(map(str, tokens))}".encode())


class BlockPool:
    """The blocks of a cache.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._names: dict[int, int] = {}  # block -> name of its content
        self._named: dict[int, int] = {}  # the inverse
        # Free blocks, the one that has been free for longest first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A block for new content; there must be a free one."""
        block, _ = self._free.popitem(last=False)
        if (name := self._names.pop(block, None)) is not None:
            del self._named[name]
        self._holders[block] = 1
        return block

    def share(self, name: int) -> int | None:
        """The block with this content, held once more; None where there is none."""
        block = self._named.get(name)
        if block is not None:
            self._free.pop(block, None)
            self._holders[block] += 1
        return block

    def publish(self, block: int, name: int) -> None:
        """Lets others find a block that is full and will not change. The first of equal ones is found."""
        if name not in self._named and block not in self._names:
            self._names[block], self._named[name] = name, block

    def give_back(self, blocks: list[int]) -> None:
        """Releases blocks of a sequence; the last of them will be needed first, the beginning is more often shared."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if not self._holders[block]:
                self._free[block] = None
