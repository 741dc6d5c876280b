"""Which ranks are named, and with which words."""

import math

import pytest

from megatron_qwen.resilience.stragglers import RankTimes, Straggler, StragglerScoring

WELL = RankTimes(compute=0.5, data=0.01, host=0.0, cores=0.0, communication=0.3, step=1.0)


def scored(windows, *, nodes=("n1", "n1", "n2", "n2"), peers=None, steps=5):
    scoring = StragglerScoring(peers or [0] * len(nodes), nodes, threshold=0.7, windows=3)
    return [scoring.add(window, steps=steps) for window in windows]


def with_slow(**changes) -> list[RankTimes]:
    """Rank 3 differs."""
    return [WELL, WELL, WELL, WELL._replace(**changes)]


@pytest.mark.parametrize(
    ("changes", "cause", "words"),
    [
        ({"compute": 1.0}, "compute", "(compute; 1.01 s a step by itself, its peers 0.51 s)"),
        ({"data": 0.6}, "data", "(waits for data; 1.1 s"),
        ({"host": 0.6}, "host", "(work between steps; 1.11 s"),
    ],
)
def test_a_straggler_is_named_once_with_its_cause(changes, cause, words):
    found = scored([with_slow(**changes)] * 5 + [[WELL] * 4] * 2)
    assert [[one.rank for one in window.named] for window in found] == [[], [], [3], [], [], [], []]
    assert [[one.rank for one in window.stragglers] for window in found] == [[], [], [3], [3], [3], [3], []]
    assert found[-1].back == (3,)
    one = found[2].named[0]
    assert (one.node, one.cause, one.windows) == ("n2", cause, 3)
    assert words in str(one)


def test_what_the_log_says():
    one = Straggler(5, "n3", 0.483, 3, "compute", 1.3, 0.63)
    assert str(one) == (
        "rank 5 on n3 is slow: 0.48 of its peers' speed for 3 windows "
        "(compute; 1.3 s a step by itself, its peers 0.63 s)"
    )


def test_waits_for_others_do_not_count():
    """The straggler's peers wait: their steps are as long as its own."""
    waiting = WELL._replace(communication=5.0, step=6.0)
    found = scored([[waiting, waiting, waiting, WELL._replace(compute=5.5, communication=0.0, step=6.0)]] * 3)
    assert [one.rank for one in found[-1].stragglers] == [3]


def test_cores_taken_by_others_count_when_that_lasts():
    found = scored([with_slow(cores=0.5)] * 13)
    named = [[(one.rank, one.cause) for one in window.named] for window in found]
    assert named == [[]] * 11 + [[(3, "cores")], []]  # 12 windows of 5 steps of 1 s
    assert found[-1].scores == (1.0,) * 4
    assert "other programs run on its cores; 1.01 s" in str(found[11].named[0])


def test_the_slowest_comes_first():
    window = [WELL] * 5 + [WELL._replace(compute=1.0), WELL._replace(compute=3.0), WELL]
    found = scored([window] * 3, nodes=["n1"] * 8)
    assert [one.rank for one in found[-1].stragglers] == [6, 5]


def test_a_node_is_named_where_most_of_its_ranks_are_slow():
    slow = WELL._replace(compute=1.0)
    window = [WELL] * 4 + [slow] * 2 + [WELL] * 2
    assert scored([window] * 3, nodes=["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"])[-1].nodes == ("n3",)
    assert scored([window] * 3, nodes=["n1"] * 4 + ["n2"] * 4)[-1].nodes == ()
    assert scored([window] * 3, nodes=["n1"] * 8)[-1].nodes == ()
    assert scored([window] * 3, nodes=[f"n{rank}" for rank in range(8)])[-1].nodes == ()


def test_a_window_without_figures_changes_nothing():
    lost = RankTimes(*[math.nan] * 6)
    found = scored([with_slow(compute=1.0)] * 2 + [[WELL, WELL, WELL, lost]] + [with_slow(compute=1.0)])
    assert math.isnan(found[2].scores[3])
    assert [[one.rank for one in window.named] for window in found] == [[], [], [], [3]]
