"""Which nodes of a job run its next attempt."""

import pytest

from megatron_qwen.job.node_choice import NodeChoice, choose

FOUR = dict.fromkeys(("n1", "n2", "n3", "n4"), 8)


@pytest.mark.parametrize(
    ("unfit", "used", "spare"),
    [
        ((), ("n1", "n2"), ("n3", "n4")),
        (("n2",), ("n1", "n3"), ("n4",)),
        (("n1", "n2"), ("n3", "n4"), ()),
        (("n3",), ("n1", "n2"), ("n4",)),
    ],
)
def test_the_first_fit_ones(unfit, used, spare):
    assert choose(FOUR, [8, 8], unfit) == NodeChoice(used, spare)


def test_too_few():
    assert choose(FOUR, [8, 8], ("n1", "n2", "n4")) is None
    assert choose(FOUR, [8] * 5, ()) is None


def test_a_node_with_fewer_tasks_replaces_none():
    uneven = {"n1": 2, "n2": 2, "n3": 1}
    assert choose(uneven, [2, 2], ()) == NodeChoice(("n1", "n2"), ("n3",))
    assert choose(uneven, [2, 2], ("n1",)) is None
