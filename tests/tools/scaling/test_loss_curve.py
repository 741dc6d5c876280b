"""The final loss of a run, and whether it diverged, by the losses of its steps."""

import math

import numpy as np
import pytest

from tools.scaling.loss_curve import RISE, tail_means, went_astray


def test_the_final_loss_is_the_mean_of_the_last_twentieth():
    losses = np.linspace(6, 3, 400).tolist()
    means = tail_means(losses)
    assert len(means) == 400 - 20 + 1
    assert means[-1] == pytest.approx(np.mean(losses[-20:]))


def test_a_short_run_is_not_told_by_a_single_step():
    assert tail_means([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])[-1] == pytest.approx(2.0)
    assert tail_means([5.0, 4.0])[-1] == pytest.approx(4.5)


def test_steps_without_a_loss_are_left_out():
    assert tail_means([4.0] * 9 + [math.nan])[-1] == pytest.approx(4.0)
    assert went_astray(tail_means([4.0] * 5 + [math.nan] * 5)) == "its loss was not finite"


@pytest.mark.parametrize(("rise", "astray"), [(0.9 * RISE, False), (1.1 * RISE, True)])
def test_a_loss_that_ends_above_where_it_was(rise, astray):
    assert (went_astray(tail_means([4.0] * 10 + [4.0 * (1 + rise)] * 10)) is not None) == astray


def test_a_window_with_one_loss_has_that_mean():
    assert tail_means([5.0] * 5 + [math.nan] * 4 + [3.0])[-1] == pytest.approx(3.0)


def test_a_run_is_judged_by_where_it_ended():
    assert went_astray(np.array([3.0, 2.0, 4.0, 5.0])) == "its loss came to 5.000, having been 2.000"
    assert went_astray(np.array([3.0, 5.0, 2.1])) is None
