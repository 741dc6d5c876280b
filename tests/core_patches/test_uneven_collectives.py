"""all_gather and reduce_scatter over gloo with pieces of unequal size."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_qwen.core_patches import uneven_collectives
from tests.core_patches.observe import outcome


def observe(prepared: bool) -> dict[str, Any]:
    """A rank alone that sends two rows where three are expected, and gets two of three."""
    return {"gather": outcome(_gather), "scatter": outcome(_scatter), "even": outcome(_even)}


def _gather() -> list[float]:
    received = torch.full((3,), 9.0)
    dist.all_gather([received], torch.ones(2))
    return received.tolist()


def _scatter() -> list[float]:
    received = torch.zeros(2)
    dist.reduce_scatter(received, [torch.arange(3.0)])
    return received.tolist()


def _even() -> list[float]:
    received = torch.zeros(2)
    dist.all_gather([received], torch.ones(2))
    return received.tolist()


def test_unequal_sizes(observed):
    assert observed.prepared == {"gather": [1.0, 1.0, 0.0], "scatter": [0.0, 1.0], "even": [1.0, 1.0]}


def test_gloo_refuses_them(observed):
    assert observed.plain["gather"].endswith("Error")
    assert observed.plain["scatter"].endswith("Error")
    assert observed.plain["even"] == [1.0, 1.0]


def test_two_ranks_pad_to_the_longest_and_cut_again():
    """This rank has two rows, the other three, which torch's all_gather of padded pieces would bring."""
    other = torch.tensor([[3.0], [4.0], [5.0]])
    sent = []

    def all_gather(outputs: list[torch.Tensor], piece: torch.Tensor, group: Any = None) -> None:
        sent.append(piece)
        for output, whole in zip(outputs, (piece, other), strict=True):
            output.copy_(whole)

    mine = torch.tensor([[1.0], [2.0]])
    outputs = [torch.empty(2, 1), torch.empty(3, 1)]
    uneven_collectives._padding(all_gather)(outputs, mine, group="group")
    assert sent[0].tolist() == [[1.0], [2.0], [0.0]]
    assert torch.equal(outputs[0], mine)
    assert torch.equal(outputs[1], other)
    with pytest.raises(AssertionError):
        uneven_collectives._padding(all_gather)(outputs, mine, async_op=True)


def test_a_rank_keeps_its_rows_of_the_sum(monkeypatch):
    """The second of two ranks, whose peer has the same pieces."""
    monkeypatch.setattr(dist, "all_reduce", lambda whole, op, group: whole.mul_(2))
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    received = torch.zeros(3)
    pieces = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    uneven_collectives._reducing_all(lambda *_, **__: None)(received, pieces)
    assert received.tolist() == [6.0, 8.0, 10.0]
