"""Mixtures against published laws of another form than ours: how well it stands in for them."""

import numpy as np
import pytest
from scipy.optimize import brentq

from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation
from tools.scaling.surface import Points

SIZES = np.exp(np.linspace(np.log(3e7), np.log(3e9), 6)).tolist()
TOKENS = np.exp(np.linspace(np.log(2e9), np.log(1e11), 5)).tolist()
EXPERTS = (1, 2, 4, 8, 16, 32)


def krajewski(n, d, granularity):
    """Krajewski et al. (arXiv 2402.07871), table of fitted coefficients; N counts all experts."""
    return 0.47 + (2.1 / granularity**0.58 + 18.1) / n**0.115 + 30.8 / d**0.147


def ludziejewski(n, d, experts):
    """Ludziejewski et al. (arXiv 2502.05172), joint law; N is active, experts enter by Clark et al.'s transform."""
    start, most = 2.0732, 290.4521
    hat = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    log = np.log(hat)
    size = 35.91 * n ** (-0.1889 + 0.0098 * log) * hat**-0.2285
    return size + 35.98 * d ** (-0.1775 - 0.0259 * log) * hat**0.5529 + 1.3637


def all_over_active(experts):
    """Feed-forwards are two thirds of a dense model's parameters."""
    return 1 + (experts - 1) * 2 / 3


@pytest.fixture(scope="module")
def sparse():
    """A study of mixtures of 1 to 32 experts, and dense models, drawn from Ludziejewski et al."""
    cells = [
        Observation(
            n,
            d,
            ludziejewski(n, d, experts),
            total_params=None if experts == 1 else n * all_over_active(experts),
            granularity=None if experts == 1 else 1.0,
        )
        for n in SIZES
        for d in TOKENS
        for experts in EXPERTS
    ]
    return fit(cells, Settings(draws=50))


def test_granularity():
    cells = [
        Observation(n / 20, d, krajewski(n, d, g), total_params=n, granularity=g)
        for n in SIZES
        for d in TOKENS
        for g in (1, 2, 4, 8, 16)
    ]
    found = fit(cells, Settings(draws=50))
    assert found.surface.named("alpha") == pytest.approx(0.115, abs=0.01)
    assert found.surface.named("beta") == pytest.approx(0.147, abs=0.01)
    assert np.exp(found.surface.named("ln_E")) == pytest.approx(0.47, abs=0.05)
    assert found.surface.named("gamma") > 0
    assert found.left_out.error < 0.005
    # What splitting a feed-forward into sixteen brings, at a size between those that were fitted.
    n, d, one = 4e8, 2e10, np.ones(1)
    points = [Points(n / 20 * one, d * one, 0 * one, 20 * one, g * one) for g in (1.0, 16.0)]
    gain = float(found.surface.loss(points[1])[0] / found.surface.loss(points[0])[0])
    assert 1 - gain == pytest.approx(1 - krajewski(n, d, 16) / krajewski(n, d, 1), rel=0.15)


def test_sparsity_predicts_the_largest_size(sparse):
    assert sparse.left_out.error < 0.006
    assert sparse.surface.spread < 0.006


@pytest.mark.parametrize("experts", [2, 8, 32])
def test_the_dense_model_on_par(sparse, experts):
    """Theirs depends on N and D, ours is one number: it lies among theirs."""
    theirs = [
        np.exp(brentq(lambda x: ludziejewski(n * np.exp(x), d, 1) - ludziejewski(n, d, experts), -3, 6))  # noqa: B023
        for n in (1e8, 1e9)
        for d in (1e10, 1e11)
    ]
    factor, low, high = sparse.surface.on_par(all_over_active(experts), 1.0)
    assert low <= factor <= high
    assert 0.98 * min(theirs) < factor < 1.02 * max(theirs)
