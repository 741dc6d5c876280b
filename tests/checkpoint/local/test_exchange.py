"""Pieces between ranks, whatever groups each of them has been in before."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_qwen.checkpoint.local.exchange import PartnerExchange, transfer
from megatron_qwen.checkpoint.local.piece import CHUNK, PieceName, PieceWriter, StagedPiece, parse, read_bytes


def sent(sender: int, receiver: int, size: int) -> list[int] | None:
    """What a third rank, which takes no part, does not get."""
    rank = dist.get_rank()
    if rank not in (sender, receiver):
        return None
    content = torch.full((size,), sender, dtype=torch.uint8) if rank == sender and size else None
    arrived = transfer(content, sender=sender, receiver=receiver, purpose="test")
    return None if arrived is None else [len(arrived), int(arrived.min()), int(arrived.max())]


def swapped(exchange: PartnerExchange, root: Path, iteration: int) -> list[tuple[int, int]]:
    """Rank and content of the pieces that have come."""
    rank = dist.get_rank()
    directory = root / str(rank) / str(iteration)
    directory.mkdir(parents=True)
    staged = StagedPiece()
    # Ranks have pieces of different sizes; rank 1's is longer than a message.
    size = 1 + rank % 2 * CHUNK
    staged.fill(lambda: iter([("state", torch.full((size,), 10 * rank + iteration, dtype=torch.uint8))]), {})
    writer = PieceWriter(directory)
    for chunk in staged.chunks():
        writer.write(chunk)
    name = PieceName(iteration, 1, rank, 3, "0" * 16, writer.digest())
    writer.abandon()
    exchange.swap(staged, name, directory)
    found = []
    for path in directory.iterdir():
        arrived = PieceName.of(path.name)
        assert arrived is not None
        found.append((arrived.rank, int(parse(read_bytes(path))[0]["state"].max())))
    return found


def in_changing_groups(root: Path) -> dict[str, object]:
    """Pairs that differ from rank to rank, then three in a ring; a fourth rank takes no part."""
    if dist.get_rank() == 3:
        return {}
    pairs = [sent(0, 1, 5), sent(1, 2, CHUNK + 7), sent(1, 2, 3), sent(2, 1, 4), sent(0, 2, 0)]
    ring = PartnerExchange((0, 1, 2), attempt=1)
    first = swapped(ring, root, 1)
    return {"pairs": pairs, "ring": [first, swapped(ring, root, 2)], "after": sent(2, 0, 6)}


def test_ranks_that_were_in_different_groups_find_one_another(pool, tmp_path):
    zero, one, two, _ = pool[4].run(in_changing_groups, tmp_path)
    assert zero["pairs"] == [None] * 5
    assert one["pairs"] == [[5, 0, 0], None, None, [4, 2, 2], None]
    assert two["pairs"] == [None, [CHUNK + 7, 1, 1], [3, 1, 1], None, None], "the last sender had nothing good"
    assert [answer["ring"] for answer in (zero, one, two)] == [
        [[(2, 21)], [(2, 22)]], [[(0, 1)], [(0, 2)]], [[(1, 11)], [(1, 12)]],
    ]  # fmt: skip
    assert [answer["after"] for answer in (zero, one, two)] == [[6, 2, 2], None, None]
