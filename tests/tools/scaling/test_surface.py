"""The law of mixtures, allocation of compute, and intervals."""

import numpy as np
import pytest

from tools.scaling import compute_optimal, surface
from tools.scaling.surface import Points, Surface

# E, A, alpha, sigma, gamma, B, beta.
MIXTURE = np.array([np.log(1.7), np.log(400.0), 0.34, 0.12, 0.03, np.log(1500.0), 0.35])


def mixtures(noise=0.0, *, seed=0):
    """Dense models and mixtures of several sizes, sparsities and granularities."""
    generator = np.random.default_rng(seed)
    rows = [
        (n, d, s, g)
        for n in np.exp(np.linspace(np.log(2e7), np.log(2e9), 6))
        for d in (2e9, 1e10, 5e10)
        for s, g in ((1, 1), (4, 1), (4, 8), (10, 4))
    ]
    n, d, s, g = np.array(rows, dtype=float).T
    points = Points(n, d, np.zeros(len(n)), s, g)
    loss = points.terms().predict(MIXTURE) + noise * generator.standard_normal(len(n))
    return Points(n, d, loss, s, g)


def test_mixtures_are_recovered():
    found = surface.fit(mixtures(), draws=20, seed=0)
    np.testing.assert_allclose(found.coefficients, MIXTURE, atol=1e-6)
    factor, low, high = found.on_par(10.0, 4.0)
    assert factor == pytest.approx(10 ** (0.12 / 0.34) * 4 ** (0.03 / 0.34), rel=1e-6)
    assert low <= factor * (1 + 1e-6)
    assert high >= factor * (1 - 1e-6)


def test_a_mixture_has_the_loss_of_its_dense_equal():
    found = surface.fit(mixtures(0.003), draws=50, seed=0)
    factor, _, _ = found.on_par(4.0, 8.0)
    one = np.ones(1)
    sparse = found.loss(Points(one * 1e9, one * 1e11, one * 0, one * 4, one * 8))
    dense = found.loss(Points(one * 1e9 * factor, one * 1e11, one * 0, one, one))
    np.testing.assert_allclose(sparse, dense, rtol=1e-9)


def test_mixture_intervals_cover_the_truth():
    held = []
    for seed in range(20):
        found = surface.fit(mixtures(0.005, seed=seed), draws=150, seed=seed)
        low, high = np.percentile(found.draws, [5, 95], axis=0)
        held.append(((low <= MIXTURE) & (high >= MIXTURE)).mean())
    assert 0.82 <= np.mean(held) <= 0.98  # 20 seeds of one design: wider than the pooled test of dense laws


def dense(noise=0.0):
    """A grid of a known law."""
    n, d = np.meshgrid(np.exp(np.linspace(np.log(1e7), np.log(1e10), 10)), np.exp(np.linspace(19, 26, 10)))
    n, d = n.ravel(), d.ravel()
    loss = np.log(1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658)
    loss = loss + noise * np.random.default_rng(0).standard_normal(len(n))
    return Points(n, d, loss, np.ones(len(n)), np.ones(len(n)))


def test_allocation_is_where_the_surface_is_least():
    """Closed form against a search, and isoflop profiles of the same surface near it."""
    found = surface.fit(dense(), draws=10, seed=0)
    allocation = compute_optimal.from_surface(found)
    for flops in (1e19, 1e22, 1e25):
        n = np.exp(np.linspace(np.log(1e6), np.log(1e14), 200_001))
        loss = 482.01 / n**0.3478 + 2085.43 / (flops / 6 / n) ** 0.3658
        assert allocation.factor * flops**allocation.exponent == pytest.approx(n[np.argmin(loss)], rel=1e-3)
    profiles = compute_optimal.profiles(dense())
    inner = [one for one in profiles if one.best_params is not None]
    assert len(inner) >= 5
    for one in inner:
        assert one.best_params == pytest.approx(allocation.factor * one.flops**allocation.exponent, rel=0.25)


def test_profiles_never_leave_what_was_measured():
    points = dense()
    for one in compute_optimal.profiles(points):
        tokens = one.flops / 6 / one.params
        assert (tokens > points.tokens.min() * 0.999).all()
        assert (tokens < points.tokens.max() * 1.001).all()


def test_the_envelope_only_improves():
    points = dense(0.01)
    kept = compute_optimal.envelope(points)
    compute, loss = (points.params * points.tokens)[kept], points.log_loss[kept]
    assert (np.diff(compute) >= 0).all()
    assert (np.diff(loss) < 0).all()


def test_many_points_are_drawn_anew_and_few_are_not():
    assert surface.fit(dense(0.01), draws=10, seed=0).resampled == "points"
    few = dense(0.01).only(np.arange(0, 100, 4))
    assert surface.fit(few, draws=10, seed=0).resampled == "residuals"


def test_same_seed_same_intervals():
    first, second = (surface.fit(dense(0.01), draws=20, seed=3).draws for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, surface.fit(dense(0.01), draws=20, seed=4).draws)


def test_an_interval_of_90_percent_leaves_5_at_either_end():
    draws = np.arange(101.0)[:, None]
    found = Surface(("x",), np.array([50.0]), draws, "points", 0.0, 3, (1.0, 1.0, 1.0))
    assert found.interval(lambda theta: theta[:, 0]) == pytest.approx((5.0, 95.0))
