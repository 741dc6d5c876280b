"""Fits of what others have measured.

chinchilla.csv: 240 points read off a figure of Hoffmann et al. (arXiv 2203.15556) by Besiroglu et al. (2404.10102;
github.com/epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv, without its five largest losses as there).
step_law.csv: the dense losses of Li et al. (2503.04715; github.com/step-law/steplaw, data/dense_lr_bs_loss.csv),
learning rates on their ladder of powers of the root of two, batches in tokens.
"""

from pathlib import Path

import numpy as np
import pytest

from tools.scaling import law
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import column, read_csv

PUBLISHED = Path(__file__).parent / "published"
# Besiroglu et al.: estimates of the notebook's grid fit, and half the widths of its 95 % intervals.
BESIROGLU = {"ln_E": (1.8172, 1.769, 1.871), "ln_A": (477.84, 285.2, 743.7), "alpha": (0.3473, 0.317, 0.373)}
BESIROGLU |= {"ln_B": (2143.9, 1042.4, 5810.3), "beta": (0.3672, 0.331, 0.415)}


@pytest.fixture(scope="module")
def chinchilla():
    """The fit with intervals."""
    return fit(read_csv(PUBLISHED / "chinchilla.csv"), Settings())


def test_chinchilla(chinchilla):
    """Their estimates, to what the optimum's flatness leaves, and every one within the intervals of the other."""
    for name, (published, low, high) in BESIROGLU.items():
        ours = chinchilla.surface.named(name)
        value = np.exp(ours) if name.startswith("ln_") else ours
        assert value == pytest.approx(published, rel=2e-3), name
        assert low < value < high
        bounds = np.percentile(chinchilla.surface.draws[:, chinchilla.surface.names.index(name)], [5, 95])
        ends = np.exp(bounds) if name.startswith("ln_") else bounds
        assert ends[0] < published < ends[1]
    assert chinchilla.surface.resampled == "points"


def test_chinchilla_is_at_the_least_of_the_objective(chinchilla):
    """The published estimates do not lie lower, and Hoffmann's own lie far higher."""
    points = chinchilla.points
    terms = points.terms()

    def value(e, a, alpha, b, beta):
        theta = np.array([[np.log(e), np.log(a), alpha, np.log(b), beta]])
        return float(
            law._objective(terms, theta, points.log_loss[None], np.ones((1, len(points.log_loss))), law.DELTA)[0]
        )

    ours = float(
        law._objective(
            terms, chinchilla.surface.coefficients[None], points.log_loss[None], np.ones((1, 240)), law.DELTA
        )[0]
    )
    assert ours == pytest.approx(1.01827e-3, rel=1e-4)
    assert ours < value(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
    assert value(1.69, 406.4, 0.34, 410.7, 0.28) > 3 * ours


def test_chinchilla_leaves_the_largest_out(chinchilla):
    assert chinchilla.left_out.error < 0.02
    exponents = {one.approach: one.exponent for one in chinchilla.allocations}
    assert exponents["surface"] == pytest.approx(0.513, abs=0.01)  # Besiroglu et al.
    assert 0.45 < exponents["isoflop"] < 0.55
    assert 0.45 < exponents["envelope"] < 0.55


def test_step_law_from_its_own_measurements():
    """Another method on the same losses: best settings near those of the published law, exponents too."""
    observations = read_csv(PUBLISHED / "step_law.csv")
    assert len(observations) == 1911
    found = fit(observations, Settings(draws=200))
    centre = found.basin.centre
    assert centre[1, 0] == pytest.approx(-0.713, abs=0.04)
    assert centre[2, 0] == pytest.approx(0.307, abs=0.08)
    assert centre[2, 1] == pytest.approx(0.571, abs=0.08)
    n, d = found.points.params, found.points.tokens
    best = np.exp(found.basin.best(np.log(n), np.log(d)))
    assert np.abs(np.log(best[:, 0] / (1.79 * n**-0.713 * d**0.307))).max() < 0.2
    assert np.abs(np.log(best[:, 1] / (0.58 * d**0.571))).max() < 0.4
    # What their own curvature makes of that: hundredths of a per cent of the loss.
    away = np.log(best / np.stack((1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571), axis=1))
    assert (0.5 * np.einsum("nv,vw,nw->n", away, found.basin.curvature, away)).max() < 1.5e-3


def test_the_measurements_are_whole():
    losses = column(read_csv(PUBLISHED / "chinchilla.csv"), "loss")
    assert len(losses) == 240
    assert losses.min() == pytest.approx(2.077, abs=2e-3)
