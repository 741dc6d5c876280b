"""Sums of power laws: what they predict, the loss that fits them, and that a fit finds its minimum."""

import numpy as np
import pytest

from tools.scaling import law
from tools.scaling.law import DELTA, Terms, moe, refine, refit

E, A, ALPHA, B, BETA = 1.7, 400.0, 0.34, 1500.0, 0.35
TRUTH = np.array([np.log(E), np.log(A), ALPHA, np.log(B), BETA])


def grid(sizes=5, horizons=5):
    """N and D of every pair."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e9, 1e12, horizons))
    return n.ravel(), d.ravel()


def log_loss(n, d):
    return np.log(E + A / n**ALPHA + B / d**BETA)


def noisy(seed=0, size=0.01):
    """Terms and losses with normal noise."""
    n, d = grid()
    return moe(n, d), log_loss(n, d) + size * np.random.default_rng(seed).standard_normal(len(n))


def test_the_dense_law():
    n, d = grid()
    terms = moe(n, d)
    assert terms.names == ("ln_E", "ln_A", "alpha", "ln_B", "beta")
    assert terms.size == 5
    assert terms.slices() == [slice(0, 1), slice(1, 3), slice(3, 5)]
    np.testing.assert_allclose(terms.predict(TRUTH), log_loss(n, d), rtol=1e-12)


def test_the_law_of_mixtures():
    """Sparsity and granularity divide A, each with an exponent of its own, where they are given."""
    n, d = grid()
    s, g = np.linspace(1, 10, len(n)), np.linspace(8, 2, len(n))
    sparse, fine, both = moe(n, d, s), moe(n, d, None, g), moe(n, d, s, g)
    assert sparse.names == ("ln_E", "ln_A", "alpha", "sigma", "ln_B", "beta")
    assert fine.names == ("ln_E", "ln_A", "alpha", "gamma", "ln_B", "beta")
    assert both.names == ("ln_E", "ln_A", "alpha", "sigma", "gamma", "ln_B", "beta")
    for terms, factor, exponents in (
        (sparse, s**0.2, [0.2]),
        (fine, g**0.1, [0.1]),
        (both, s**0.2 * g**0.1, [0.2, 0.1]),
    ):
        theta = np.concatenate((TRUTH[:3], exponents, TRUTH[3:]))
        expected = np.log(E + A / (n**ALPHA * factor) + B / d**BETA)
        np.testing.assert_allclose(terms.predict(theta), expected, rtol=1e-12)


def test_predictions_of_many_coefficients_and_of_some_points():
    n, d = grid()
    terms = moe(n, d)
    # A constant more in every term is a factor of L.
    shifts = np.arange(6.0)[:, None]
    thetas = TRUTH + shifts * [1, 1, 0, 1, 0]
    np.testing.assert_allclose(terms.predict(thetas), log_loss(n, d) + shifts, rtol=1e-12)
    some = terms.only(np.array([3, 7]))
    assert some.names == terms.names
    np.testing.assert_allclose(some.predict(TRUTH), log_loss(n, d)[[3, 7]], rtol=1e-12)


def test_exponentials_that_no_number_holds():
    """ln(e^2000 + e^1000 + e^1000) is 2000."""
    assert moe(np.ones(1), np.ones(1)).predict(np.array([2000.0, 1000, 0, 1000, 0])) == pytest.approx([2000.0])


def test_the_huber_loss():
    """A parabola up to delta, then a line of its slope: 0.5 x^2, and delta |x| - 0.5 delta^2."""
    found = law._huber(np.array([0.0, 0.1, -0.2, 0.3, -1.2]), 0.2)
    np.testing.assert_allclose(found, [0.0, 0.005, 0.02, 0.04, 0.22])


def test_the_objective_is_a_weighted_sum():
    """Three points of L = 3 e^c: residuals of c = 0.1 and 1 against ln 3, with delta = 0.2."""
    terms = moe(np.ones(3), np.ones(3))
    thetas = np.array([[c, c, 5.0, c, 5.0] for c in (0.1, 1.0)])
    y, weights = np.full((1, 3), np.log(3.0)), np.array([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(law._objective(terms, thetas, y, weights, 0.2), [7 * 0.005, 7 * 0.18])


@pytest.mark.parametrize("delta", [1e-3, 0.02, 1.0])
def test_the_slope_is_the_derivative(delta):
    """Against central differences of the objective, in units of delta."""
    terms, y = noisy(size=0.03)
    weights = np.linspace(0.5, 2, len(y))

    def value(theta):
        return law._objective(terms, theta[None], y[None], weights[None], delta)[0] / delta

    found, slope = law._value_and_slope(TRUTH, terms, y, weights, delta)
    assert found == pytest.approx(value(TRUTH), rel=1e-12)
    steps = 1e-7 * np.eye(5)
    expected = [(value(TRUTH + step) - value(TRUTH - step)) / 2e-7 for step in steps]
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_centred_features_make_the_same_law():
    n, d = grid()
    terms = moe(n, d, np.linspace(1, 10, len(n)), np.linspace(8, 2, len(n)) ** 2)
    centred, shift = law._centred(terms)
    assert centred.names == terms.names
    for block, plain in zip(centred.features, terms.features, strict=True):
        assert (block[0] == 1).all()
        np.testing.assert_allclose(block[1:].mean(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(np.ptp(block, axis=1), np.ptp(plain, axis=1))
    theta = np.linspace(0.1, 0.7, 7)
    np.testing.assert_allclose(centred.predict(theta), terms.predict(theta @ shift), rtol=1e-12)


def test_starts_meet_the_median_loss_at_the_middle_of_the_points():
    """A floor of four shares of the least loss, the rest shared in three ways, and four exponents each."""
    middle = Terms((np.ones((1, 1)), np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]])), moe(*grid()).names)
    losses = np.log([2.0, 3.0, 5.0])
    starts = law._starts(middle, losses)
    assert len(starts) == len(np.unique(starts, axis=0)) == 4 * 3 * 4 * 4
    np.testing.assert_allclose(middle.predict(starts), np.log(3.0))
    assert np.unique(np.exp(starts[:, 0]).round(9)).tolist() == pytest.approx([0.6, 1.2, 1.6, 1.9])
    of_size = np.exp(starts[:, 1]) / (3.0 - np.exp(starts[:, 0]))
    assert np.unique(of_size.round(9)).tolist() == pytest.approx([0.15, 0.5, 0.85])
    assert np.unique(starts[:, 2]).tolist() == np.unique(starts[:, 4]).tolist() == [0.1, 0.3, 0.5, 0.9]


def test_starts_of_equal_losses_leave_something_for_each_term():
    n, d = grid()
    starts = law._starts(moe(n, d, np.linspace(1, 2, len(n))), np.full(len(n), 1e-3))
    assert np.isfinite(starts).all()
    assert (starts[:, 3] == 0).all()  # mixtures start as dense models


def test_a_fit_recovers_the_law():
    n, d = grid()
    np.testing.assert_allclose(law.fit(moe(n, d), log_loss(n, d)), TRUTH, rtol=1e-5)


def test_one_wild_loss_moves_a_fit_little():
    """Its pull is bounded by delta: with squares it would move alpha by a tenth or more."""
    n, d = grid()
    wild = log_loss(n, d)
    wild[7] += 0.5
    robust, squares = law.fit(moe(n, d), wild), law.fit(moe(n, d), wild, delta=10.0)
    np.testing.assert_allclose(robust, TRUTH, rtol=0.02)
    assert abs(squares[2] / ALPHA - 1) > 0.1


def test_a_point_without_weight_is_left_out_and_one_of_weight_two_counts_twice():
    terms, y = noisy()
    n_points = len(y)
    weights = np.ones(n_points)
    weights[4], weights[9] = 0.0, 2.0
    chosen = np.array([*(i for i in range(n_points) if i != 4), 9])
    found, other = law.fit(terms, y, weights=weights), law.fit(terms.only(chosen), y[chosen])
    np.testing.assert_allclose(found, other, rtol=1e-4)


def slopes_at(terms, thetas, y, weights, delta=DELTA):
    """The largest derivative of the objective over that at the truth."""
    centred, shift = law._centred(terms)
    back = np.linalg.inv(shift)
    found = []
    for theta, one, weight in zip(thetas, y, weights, strict=True):
        at, before = (
            np.abs(law._value_and_slope(where @ back, centred, one, weight, delta)[1]).max() for where in (theta, TRUTH)
        )
        found.append(at / before)
    return np.array(found)


def test_refits_of_weights_and_of_losses_are_minima():
    """Resampled points have weights of their own and common losses, resampled residuals the other way round."""
    terms, y = noisy()
    generator = np.random.default_rng(1)
    start = law.fit(terms, y)
    weights = generator.multinomial(25, np.full(25, 1 / 25), size=7).astype(float)
    found = refit(terms, y[None], weights, start=start, delta=0.01)
    assert found.shape == (7, 5)
    assert slopes_at(terms, found, np.tile(y, (7, 1)), weights, 0.01).max() < 1e-3
    losses = y + 0.01 * generator.standard_normal((7, 25))
    found = refit(terms, losses, np.ones((1, 25)), start=start, delta=0.01)
    assert slopes_at(terms, found, losses, np.ones((7, 25)), 0.01).max() < 1e-3


@pytest.mark.parametrize("common", ["nothing", "losses", "weights"])
@pytest.mark.parametrize("rows", [2, 7])
def test_refits_do_not_depend_on_how_many_share_an_array(rows, common, monkeypatch):
    terms, y = noisy()
    losses = y + 0.01 * np.random.default_rng(1).standard_normal((1 if common == "losses" else rows, 25))
    weights = np.random.default_rng(2).uniform(0.5, 2, (1 if common == "weights" else rows, 25))
    whole = refit(terms, losses, weights, start=TRUTH, delta=0.1)
    for elements in (75, 25, 1):  # three rows at a time with one left over, one, and one though it is too large
        monkeypatch.setattr(law, "_CHUNK_ELEMENTS", elements)
        np.testing.assert_allclose(refit(terms, losses, weights, start=TRUTH, delta=0.1), whole, rtol=1e-6)


def test_a_refit_of_the_same_data_stays():
    terms, y = noisy()
    start = law.fit(terms, y)
    np.testing.assert_allclose(refit(terms, y[None], np.ones((1, 25)), start=start)[0], start, rtol=1e-6)


def test_squares_are_refined_to_the_solution_of_least_squares():
    """A delta beyond every residual: against scipy's trust region."""
    from scipy.optimize import least_squares

    terms, y = noisy()
    expected = least_squares(lambda theta: terms.predict(theta) - y, TRUTH, x_scale=np.abs(TRUTH), xtol=1e-12).x
    centred, shift = law._centred(terms)
    begin = np.linalg.solve(shift.T, TRUTH * 1.1)
    found = refine(centred, y[None], np.ones((1, 25)), start=begin, delta=10.0)[0] @ shift
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_rows_are_refined_each_for_itself():
    """One that is at its minimum already does not stop the others."""
    terms, _ = noisy()
    centred, shift = law._centred(terms)
    begin = np.linalg.solve(shift.T, TRUTH)
    at, away = terms.predict(TRUTH), noisy(size=0.02)[1]
    both = refine(centred, np.stack((at, away, away)), np.ones((3, 25)), start=begin, delta=0.1) @ shift
    np.testing.assert_allclose(both[0], TRUTH, rtol=1e-9)
    np.testing.assert_allclose(both[1], both[2], rtol=1e-9)
    assert slopes_at(terms, both[1:2], away[None], np.ones((1, 25)), 0.1)[0] < 1e-6


def test_models_of_one_size_are_fitted_though_they_do_not_tell_e_from_a():
    """Damping keeps the singular system solvable, and every loss is met all the same."""
    d = np.geomspace(1e9, 1e12, 12)
    terms = law._centred(moe(np.full(12, 1e9), d))[0]
    y = log_loss(1e9, d)
    found = refine(terms, y[None], np.ones((1, 12)), start=np.array([0.2, 0.1, 0.3, -1.5, 0.5]), delta=0.1)[0]
    np.testing.assert_allclose(terms.predict(found), y, atol=1e-6)
    assert found[2] == 0.3


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0, 0.0, 0.0), (0.5, -1.0, 2.0, -1.0, 0.1)])
def test_starts_whose_first_steps_overshoot_still_come_to_the_minimum(start):
    n, d = grid()
    centred, shift = law._centred(moe(n, d))
    found = refine(centred, log_loss(n, d)[None], np.ones((1, 25)), start=np.array(start), delta=10.0)[0]
    np.testing.assert_allclose(found @ shift, TRUTH, rtol=1e-6)
