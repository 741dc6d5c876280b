"""Copies pieces between nodes through host memory, over gloo groups of the few ranks that take part."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from megatron_qwen.checkpoint.local.piece import CHUNK, PieceName, PieceWriter, StagedPiece

# A chunk takes milliseconds; a partner may be late by the time that it writes its own piece. Much shorter than
# resilience.hang_timeout_s: a partner that does not answer must not look like a hang. Chosen by hand.
_TIMEOUT = datetime.timedelta(seconds=120)
_WORDS = 4  # of 32 bits, of a hash


def make_group(ranks: Sequence[int], purpose: str) -> dist.ProcessGroup:
    """A gloo group of its own for these ranks, which only they call together.

    ``dist.new_group`` numbers groups with a counter of the process. Ranks that have been in different groups count
    differently, and would then look for one another under different names.

    Args:
        ranks: the members, in the same order on each. Their numbers within the group are their places here.
        purpose: of the group, the same on each. It may be used again: every time is counted for itself.
    """
    name, rank = f"{purpose}/{'_'.join(map(str, ranks))}", list(ranks).index(dist.get_rank())
    store = dist.distributed_c10d._get_default_store()
    time = store.add(f"{name}/made_by_{rank}", 1)
    store = PrefixStore(f"{name}/{time}", store)
    group = dist.ProcessGroup(store, rank, len(ranks))
    gloo = dist.ProcessGroupGloo(store, rank, len(ranks), _TIMEOUT)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


class PartnerExchange:
    """Sends each piece to the next of the partners, and keeps what the one before sends.

    Args:
        ranks: the partners, in order, this rank among them.
        attempt: number of this attempt.
    """

    def __init__(self, ranks: Sequence[int], *, attempt: int) -> None:
        self.group, self._ranks = make_group(ranks, f"partners/{attempt}"), list(ranks)
        place = self._ranks.index(dist.get_rank())
        self._next, self._before = (place + 1) % len(ranks), (place - 1) % len(ranks)  # in the group

    def swap(self, staged: StagedPiece, name: PieceName, directory: Path) -> None:
        """Sends a piece and writes the one that arrives; called by the partners together.

        Args:
            staged: this rank's piece.
            name: of it.
            directory: where the other's piece goes.

        Raises:
            RuntimeError: a partner did not answer.
            OSError: the other's piece could not be written here.
            PieceError: it has not arrived as it was sent.
        """
        theirs, *words = self._sizes(staged, name)[self._before]
        rank = self._ranks[self._before]
        held = PieceName(name.iteration, name.attempt, rank, name.world_size, name.layout, _hex(words), kept="held")
        writer = PieceWriter(directory)
        try:
            outgoing, left = staged.chunks(), theirs
            while True:
                chunk = next(outgoing, None)
                pending: list[dist.Work] = []
                incoming = torch.empty(min(left, CHUNK), dtype=torch.uint8)
                if len(incoming):
                    pending.append(self.group.recv([incoming], self._before, 0))
                if chunk is not None:
                    pending.append(self.group.send([_as_tensor(chunk)], self._next, 0))
                if not pending:
                    break
                for work in pending:
                    work.wait()
                writer.write(memoryview(incoming.numpy()))
                left -= len(incoming)
        except BaseException:
            writer.abandon()
            raise
        writer.finish(held)

    def _sizes(self, staged: StagedPiece, name: PieceName) -> list[list[int]]:
        """Bytes and hash of every partner's piece, in their order."""
        mine = torch.tensor([staged.size, *_words(name.digest)], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in self._ranks]
        self.group.allgather([everyone], [mine]).wait()
        return [one.tolist() for one in everyone]


def transfer(content: torch.Tensor | None, *, sender: int, receiver: int, purpose: str) -> torch.Tensor | None:
    """Sends bytes from one rank to another; only these two call.

    Args:
        content: uint8, on the sender; None where it has nothing good to send.
        sender: rank.
        receiver: another rank.
        purpose: of the group, the same on both.

    Returns:
        What arrived, on the receiver.
    """
    group = make_group((sender, receiver), purpose)
    size = torch.tensor([-1 if content is None else content.numel()], dtype=torch.int64)
    if dist.get_rank() == sender:
        group.send([size], 1, 0).wait()
        for chunk in () if content is None else content.split(CHUNK):
            group.send([chunk], 1, 0).wait()
        return None
    group.recv([size], 0, 0).wait()
    if int(size) < 0:
        return None
    arrived = torch.empty(int(size), dtype=torch.uint8)
    for chunk in arrived.split(CHUNK):
        group.recv([chunk], 0, 0).wait()
    return arrived


def _as_tensor(chunk: memoryview) -> torch.Tensor:
    return torch.frombuffer(chunk if not chunk.readonly else bytearray(chunk), dtype=torch.uint8)


def _words(digest: str) -> Iterator[int]:
    yield from (int(digest[begin : begin + 8], 16) for begin in range(0, 8 * _WORDS, 8))


def _hex(words: Sequence[int]) -> str:
    return "".join(f"{word:08x}" for word in words)
