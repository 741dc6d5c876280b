"""Every source has its share at every moment."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data.order.apportion import Apportionment


def off(weights: list[float], samples: int) -> float:
    """Most samples by which any source was ever off its share."""
    apportionment, worst = Apportionment(weights), 0.0
    for number in range(1, samples + 1):
        apportionment.next()
        worst = max(worst, float(np.abs(apportionment.counts - apportionment.weights * number).max()))
    return worst


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.05, 0.05], [1e-4, 0.9999], [1 / 3] * 3, list(range(1, 41))]
)
def test_never_a_whole_sample_off_in_100_000(weights):
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0
    assert off(weights, 100_000) <= bound + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=30))
def test_any_weights(weights):
    assert off(weights, 500) < 1


def test_two_thousand_sources():
    weights = (np.random.default_rng(0).pareto(1.0, 2000) + 0.01).tolist()
    assert off(weights, 5_000) < 1


def test_goes_on_from_counts():
    one = Apportionment([0.6, 0.3, 0.1])
    taken = [one.next() for _ in range(500)]
    half = Apportionment([0.6, 0.3, 0.1])
    for _ in range(250):
        half.next()
    other = Apportionment([0.6, 0.3, 0.1], half.counts.tolist())
    assert [other.next() for _ in range(250)] == taken[250:]
    for source in range(3):  # each source's own samples are numbered without gaps
        assert [index for chosen, index in taken if chosen == source] == list(range(one.counts[source]))
