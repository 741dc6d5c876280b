"""Scores against peers, on series that are made by hand."""

import math
import random

import pytest

from megatron_qwen.resilience.peer_scores import PeerScores

NODE = ["n1"] * 8


def scores(figures, **more) -> list[float]:
    """Of one window, one group."""
    found = PeerScores([0] * len(figures), ["n1"] * len(figures), threshold=0.7, windows=3, **more)
    return [one.score for one in found.add(figures, step_s=[10.0] * len(figures))]


def slow_windows(windows, *, peers=None, nodes=None, step_s=1.0, works=None, **more) -> list[list[int]]:
    """For how many windows each rank has been slow, window by window."""
    count = len(windows[0])
    found = PeerScores(peers or [0] * count, nodes or ["n1"] * count, threshold=0.7, windows=3, **more)
    works = works or [None] * len(windows)
    return [
        [one.slow_windows for one in found.add(figures, step_s=[step_s] * count, steps=5, work=work)]
        for figures, work in zip(windows, works, strict=True)
    ]


def test_a_score_is_what_the_others_need_over_what_a_rank_needs():
    assert scores([1.0, 1.0, 4.0, 2.0]) == [2.0, 2.0, 0.25, 0.5]
    assert scores([1.0, 2.0]) == [2.0, 0.5]
    assert scores([1.0, 1.0, 3.0]) == [2.0, 2.0, pytest.approx(1 / 3)]


def test_what_is_not_known_has_no_score_and_counts_for_nobody():
    found = scores([1.0, math.nan, 2.0, 1.0])
    assert math.isnan(found[1])
    assert [found[0], found[2], found[3]] == [1.5, 0.5, 1.5]
    assert all(map(math.isnan, scores([1.0, math.nan])))
    assert all(map(math.isnan, scores([1.0])))
    assert math.isnan(scores([0.0, 1.0])[0])


def test_a_slow_rank_is_named_after_three_windows_and_forgotten_when_it_is_back():
    slow, well = [0.5] * 7 + [0.75], [0.5] * 8
    found = slow_windows([slow] * 4 + [well] * 3)
    assert [one[7] for one in found] == [0, 0, 3, 4, 5, 0, 0]
    assert all(one[:7] == [0] * 7 for one in found)


def test_one_outlier_names_nobody():
    windows = [[0.5] * 8, [0.5] * 7 + [5.0], [0.5] * 8, [0.5] * 7 + [5.0], [0.5] * 7 + [5.0], [0.5] * 8]
    assert all(one == [0] * 8 for one in slow_windows(windows))


@pytest.mark.parametrize(("factor", "named"), [(1.40, False), (1.45, True), (6.0, True)])
def test_the_threshold_is_seven_tenths(factor, named):
    assert bool(slow_windows([[0.5] * 7 + [0.5 * factor]] * 3)[-1][7]) is named


def test_a_margin_keeps_a_slow_rank_from_being_named_again_and_again():
    at_the_limit = [[0.5] * 7 + [0.5 / score] for score in (0.6, 0.6, 0.6, 0.75, 0.75, 0.75, 0.85, 0.85)]
    assert [one[7] for one in slow_windows(at_the_limit)] == [0, 0, 3, 4, 5, 6, 7, 0]


def test_half_of_the_ranks_may_be_slow():
    found = slow_windows([[0.5] * 4 + [1.0] * 4] * 3)
    assert found[-1] == [0, 0, 0, 0, 3, 3, 3, 3]


def test_where_all_are_slow_nobody_is():
    assert slow_windows([[0.1] * 8] * 3 + [[0.9] * 8] * 5)[-1] == [0] * 8


def test_an_excess_within_the_spread_of_the_peers_names_nobody():
    quiet = [0.50, 0.51, 0.49, 0.50, 0.51, 0.49, 0.50, 0.80]
    noisy = [0.30, 0.40, 0.46, 0.50, 0.55, 0.60, 0.62, 0.80]
    assert slow_windows([quiet] * 3)[-1][7] == 3
    assert slow_windows([noisy] * 3)[-1] == [0] * 8


def test_an_excess_that_is_nothing_of_a_step_names_nobody():
    windows = [[0.010] * 7 + [0.025]] * 3
    assert slow_windows(windows, step_s=0.5)[-1][7] == 3
    assert slow_windows(windows, step_s=1.0)[-1] == [0] * 8


def test_it_has_to_last_where_it_is_asked_to():
    windows = [[0.5] * 7 + [1.0]] * 12
    found = [one[7] for one in slow_windows(windows, least_s=50.0)]  # a window of 5 steps of 1 s
    assert found == [0] * 9 + [3, 4, 5]


def test_ranks_of_another_stage_are_no_peers():
    stages = [0, 0, 0, 1, 1, 1]
    found = PeerScores(stages, ["n1"] * 6, threshold=0.7, windows=3).add([1.0, 1, 2, 5, 5, 5], step_s=[9.0] * 6)
    assert [one.score for one in found] == [1.5, 1.5, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("peers", "nodes"),
    [([0, 1, 2, 3], ["n1", "n1", "n1", "n1"]), ([0, 0, 1, 1], ["n1", "n1", "n2", "n2"])],
    ids=["a rank a stage", "a node a stage"],
)
def test_without_independent_peers_ranks_are_compared_with_their_beginning(peers, nodes):
    well, slow = [0.2, 0.2, 0.5, 0.5], [0.2, 0.2, 1.0, 1.0 if peers == [0, 0, 1, 1] else 0.5]
    found = slow_windows([well] * 6 + [slow] * 4, peers=peers, nodes=nodes)
    assert found[5] == [0] * 4
    assert found[8][:3] == [0, 0, 3]


def test_a_beginning_starts_anew_with_other_work():
    short, long = [0.2, 0.2, 0.5], [0.3, 0.3, 1.4]  # longer sequences weigh more on the last stage
    works = [1] * 6 + [2] * 6
    assert slow_windows([short] * 6 + [long] * 6, peers=[0, 1, 2], works=works)[-1] == [0] * 3
    assert slow_windows([short] * 6 + [long] * 6, peers=[0, 1, 2])[-1][2] > 0


@pytest.mark.parametrize("spread", [0.02, 0.05, 0.1])
def test_noise_names_nobody_and_hides_no_straggler(spread):
    """1,000 windows of eight ranks; then one is twice as slow."""
    noise = random.Random(7)
    found = PeerScores([0] * 8, NODE, threshold=0.7, windows=3)

    def add(factor: float) -> list[int]:
        figures = [0.5 * noise.lognormvariate(0.0, spread) for _ in range(8)]
        figures[3] *= factor
        return [one.slow_windows for one in found.add(figures, step_s=[1.0] * 8)]

    assert all(add(1.0) == [0] * 8 for _ in range(1000))
    named = [add(2.0)[3] for _ in range(10)]
    assert any(named[2:4])
