"""The sigmoid from a measure to a share of right answers: drawn ones are found again, with intervals that hold."""

import numpy as np
import pytest

from megatron_qwen.errors import DataError
from tests.tiers import count
from tools.scaling.score_link import link

LOW, HIGH, MIDDLE, WIDTH = 0.25, 0.9, 0.8, 0.12
NOISE = 0.01


def share(measure):
    return LOW + (HIGH - LOW) / (1 + np.exp((measure - MIDDLE) / WIDTH))


def drawn(seed, count=24):
    generator = np.random.default_rng(seed)
    measures = generator.uniform(0.6, 1.3, count)
    return measures, share(measures) + NOISE * generator.standard_normal(count)


def test_a_drawn_one_is_found():
    measures = np.linspace(0.4, 1.4, 30)
    found = link(measures, share(measures))
    assert found.coefficients == pytest.approx([LOW, HIGH, MIDDLE, WIDTH], abs=1e-3)
    assert found.score(0.5) == pytest.approx(share(0.5), abs=1e-3)
    assert found.spread < 1e-3


def test_a_larger_model_is_in_its_interval_as_often_as_said():
    """Its measure is known but for 1 %, and lies beyond all that was fitted."""
    inside, generator = 0, np.random.default_rng(99)
    draws = count(quick=14, thorough=40)
    for seed in range(draws):
        found = link(*drawn(seed))
        low, high = found.interval(0.55 * np.exp(0.01 * generator.standard_normal(1000)))
        inside += low <= share(0.55) + NOISE * generator.standard_normal() <= high
    assert 0.75 * draws <= inside <= draws


@pytest.mark.parametrize(
    ("measures", "scores"),
    [([0.5, 0.6, 0.7, 0.8], [0.5, 0.4, 0.35, 0.3]), ([1.0] * 8, [0.3] * 8), (list(np.linspace(1, 2, 8)), [0.25] * 8)],
    ids=["too few", "one measure", "chance"],
)
def test_what_says_nothing_is_refused(measures, scores):
    with pytest.raises(DataError, match="do not determine how they depend on the measure"):
        link(measures, scores)
