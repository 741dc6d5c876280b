"""Best settings of single models, and the flaws of the grids they were sought on."""

import dataclasses

import numpy as np
import pytest

from tests.tools.scaling.studies import SETTING_LAWS, Study
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import DIVERGED, Observation


def grid_of(values, best, *, curvature=0.05, noise=0.0, n=1e8, d=2e9, seed=0):
    """Losses over learning rates, a quadratic in their logarithm."""
    generator = np.random.default_rng(seed)
    return [
        Observation(
            n,
            d,
            3.0 * np.exp(0.5 * curvature * np.log(rate / best) ** 2 + noise * generator.standard_normal()),
            learning_rate=rate,
        )
        for rate in values
    ]


def only(observations, **settings):
    found = fit(observations, Settings(draws=50, window=1.0, **settings))
    assert len(found.optima) == 1
    return found.optima[0]


RATES = [2.0**power for power in range(-13, -6)]


def test_step_law_within_five_per_cent():
    """The report's method on losses drawn from Step Law, with 0.1 % noise: every learning rate and batch."""
    found = fit(Study(noise=0.001).draw(0), Settings(draws=100))
    n, d = found.points.params, found.points.tokens
    best = np.exp(found.basin.best(np.log(n), np.log(d)))
    for v, (factor, a, b) in enumerate(SETTING_LAWS["step law"]):
        np.testing.assert_allclose(best[:, v], factor * n**a * d**b, rtol=0.05)


def test_a_clear_minimum():
    one = only(grid_of(RATES, 1e-3))
    assert one.value == pytest.approx(1e-3, rel=1e-6)
    assert one.flags == ()
    assert one.settings == len(RATES)


def test_a_minimum_beyond_either_end():
    assert "edge high" in only(grid_of(RATES, 0.05)).flags
    assert "edge low" in only(grid_of(RATES, 1e-5)).flags


def test_divergence_above_explains_the_upper_end():
    """Nothing is left to try there, so the grid has no flaw."""
    cells = grid_of(RATES, 0.02)
    blown = dataclasses.replace(cells[-1], learning_rate=2.0**-6, status=DIVERGED, loss=np.nan)
    assert "edge high" in only(cells).flags
    assert "edge high" not in only([*cells, blown]).flags


def test_noise_larger_than_the_basin_is_flat():
    flat = only(grid_of(RATES, 1e-3, curvature=1e-4, noise=0.01))
    assert "flat" in flat.flags
    assert flat.value is None


def test_two_settings_are_too_few():
    one = only(grid_of(RATES[:2], 1e-3))
    assert "few settings" in one.flags
    assert one.value is None


def test_one_horizon_a_size_cannot_tell_n_from_d():
    cells = [cell for cell in Study(horizons=(20,)).draw(0) if cell.status == "done"]
    found = fit(cells, Settings(draws=20))
    assert found.basin.features == ("1", "ln_N")
    assert any("ln_D" in note for note in found.notes)
