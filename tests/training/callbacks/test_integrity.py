"""Reports of all ranks, of which nearly always none has anything to say."""

import pytest
import torch

from megatron_qwen.training.callbacks.integrity import _first_of_group, _Replicas, _Reports

# Two pipeline stages of two tensor ranks, data-parallel twice; experts of another layout.
DENSE = [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
EXPERT = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_a_group_is_known_by_its_first_rank():
    assert _first_of_group(DENSE) == [0, 1, 0, 1, 4, 5, 4, 5]
    assert _first_of_group(EXPERT) == [0, 1, 2, 3, 4, 5, 4, 5]


@pytest.mark.parametrize(
    ("part", "rank", "sound"),
    [
        (None, 0, True), ("changed", 5, False), ("dense", 0, False), ("dense", 7, False), ("expert", 4, False),
        ("expert", 7, False), ("expert", 2, True),  # nobody else has these experts
    ],
)  # fmt: skip
def test_one_odd_number_is_seen(part, rank, sound):
    replicas = _Replicas(*(torch.tensor(_first_of_group(places)) for places in (DENSE, EXPERT)))
    dense = torch.tensor([-(2**63), 2**63 - 1])[torch.arange(8) % 2] // 3 + replicas.dense
    reports = _Reports(torch.zeros(8, dtype=torch.int64), dense, replicas.expert * 7)
    if part is not None:
        getattr(reports, part)[rank] += 1
    assert reports.is_sound(replicas) is sound
