"""Scores of values against the median of those before, with values worked out by hand."""

import math
import random
import statistics

import pytest

from megatron_qwen.resilience.spikes import SpikeScore


def scored(values: list[float], window: int = 128) -> SpikeScore:
    score = SpikeScore(window)
    for value in values:
        score.add(value)
    return score


def test_the_score_is_in_robust_standard_deviations():
    score = scored([90.0, 100.0, 110.0] * 6)
    # Median 100; two thirds of the deviations are 10, so their median is 10, and sigma is 10 / 0.6745.
    assert score.score(100 + 10 / 0.6745 * 7) == pytest.approx(7)
    assert score.score(40) == 0, "a value below the median is no spike"


def test_a_normal_distribution_scores_its_own_deviations():
    source = random.Random(1)
    score = scored([source.gauss(50, 3) for _ in range(4000)], window=4000)
    assert score.score(50 + 3 * 6) == pytest.approx(6, rel=0.08)


def test_earlier_spikes_do_not_hide_the_next():
    source = random.Random(1)
    calm = [source.gauss(2, 0.1) for _ in range(100)]
    with_spikes = [*calm, *[50.0] * 10]
    assert scored(with_spikes).score(50) > 100
    mean, deviation = statistics.mean(with_spikes), statistics.stdev(with_spikes)
    assert (50 - mean) / deviation < 10, "the mean would have followed them"


def test_values_that_hardly_vary_have_a_least_spread():
    score = scored([4.0] * 20)
    assert score.score(4.0 * 1.01) == pytest.approx(1)
    assert scored([0.0] * 20).score(1) == 0


def test_no_score_before_sixteen_values_except_for_what_is_not_finite():
    score = scored([1.0] * 15)
    assert score.score(1e9) == 0
    assert score.score(math.nan) == score.score(math.inf) == math.inf
    score.add(1.0)
    assert score.score(1e9) > 0
    score.add(math.nan)
    assert score.score(1.0) == 0


def test_the_window_forgets():
    score = scored([1.0] * 16 + [100.0] * 16, window=16)
    assert score.score(100.0) == 0
