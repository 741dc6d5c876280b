"""The best N for a compute budget, on losses whose best N is known in closed form."""

import numpy as np
import pytest

from tools.scaling.compute_optimal import envelope, from_envelope, from_profiles, from_surface, profiles
from tools.scaling.surface import Points, Surface

# At fixed N D the product of the two logarithms in ``log_loss`` is largest where N / N0 = D / D0, which is D = 20 N.
# And ln L of a model is linear in ln D, so that interpolation between horizons is exact.
N0, D0, LEVEL, SLOPE = 1e6, 2e7, np.log(4.0), 0.01
SIZES = tuple(1e8 * 2.0**power for power in range(6))
HORIZONS = (1e9, 4e9, 32e9)


def log_loss(n, d):
    return LEVEL - SLOPE * np.log(n / N0) * np.log(d / D0)


def points_of(rows):
    """Points from rows of N, D, ln L and sparsity."""
    n, d, loss, sparsity = np.array(rows, dtype=float).reshape(-1, 4).T
    return Points(n, d, loss, sparsity, np.ones_like(n))


def study(sizes=SIZES, horizons=HORIZONS, law=log_loss):
    return [(n, d, law(n, d), 1.0) for n in sizes for d in horizons]


def test_profiles_span_what_three_models_reach():
    """The third model begins at 6 x 4e8 x 1e9 FLOPs and the third from the end ends at 6 x 8e8 x 32e9."""
    found = profiles(points_of(study()))
    np.testing.assert_allclose([one.flops for one in found], np.geomspace(2.4e18, 1.536e20, 9))


@pytest.mark.parametrize("horizons", [HORIZONS, (1e9, 32e9)])
def test_a_profile_has_every_model_that_was_trained_as_long(horizons):
    found = profiles(points_of(study(horizons=horizons)))
    assert len(found) == 9
    for one in found:
        reached = [n for n in SIZES if 1e9 * (1 - 1e-6) <= one.flops / (6 * n) <= 32e9 * (1 + 1e-6)]
        assert one.params.tolist() == reached
        expected = [np.exp(log_loss(n, one.flops / (6 * n))) for n in reached]
        np.testing.assert_allclose(one.loss, expected, rtol=1e-9)


def test_the_vertex_of_a_profile():
    for one in profiles(points_of(study())):
        best = np.sqrt(one.flops / 120)  # C = 6 N D = 120 N^2
        assert one.best_params == pytest.approx(best, rel=1e-6)
        assert one.best_loss == pytest.approx(np.exp(log_loss(best, 20 * best)), rel=1e-9)


def test_the_power_law_through_the_vertices():
    found = profiles(points_of(study()))
    allocation = from_profiles(found)
    assert allocation.approach == "isoflop"
    assert allocation.exponent == pytest.approx(0.5, rel=1e-6)
    assert allocation.factor == pytest.approx(1 / np.sqrt(120), rel=1e-4)
    assert allocation.flops.tolist() == [one.flops for one in found]
    assert allocation.params.tolist() == [one.best_params for one in found]
    assert allocation.interval is None


def test_a_power_law_needs_three_vertices():
    found = profiles(points_of(study()))
    assert from_profiles(found[:3]).exponent == pytest.approx(0.5, rel=1e-6)
    assert from_profiles(found[:2]) is None
    assert from_profiles([found[0], found[1], found[1]]) is None
    assert from_profiles([]) is None


@pytest.mark.parametrize("tokens_a_parameter", [0.01, 1e5])
def test_a_vertex_outside_the_models_is_none(tokens_a_parameter):
    """The best N lies above or below all that were trained."""

    def law(n, d):
        return LEVEL - SLOPE * np.log(n / N0) * np.log(d / (tokens_a_parameter * N0))

    found = profiles(points_of(study(law=law)))
    assert len(found) == 9
    assert all(one.best_params is None and one.best_loss is None for one in found)
    assert from_profiles(found) is None


def test_a_profile_with_its_largest_loss_inside_has_no_best():
    found = profiles(points_of(study(law=lambda n, d: -log_loss(n, d))))
    assert len(found) == 9
    assert all(one.best_params is None and one.best_loss is None for one in found)
    for one in found:
        np.testing.assert_allclose(np.log(one.loss), -log_loss(one.params, one.flops / (6 * one.params)), rtol=1e-9)


def test_profiles_use_dense_models_with_two_horizons():
    """A mixture and a model with one horizon change nothing, whatever their losses."""
    others = [(3e8, d, 0.1, 1.5) for d in HORIZONS] + [(5e8, 4e9, 0.1, 1.0)]
    with_others, without = profiles(points_of(others + study())), profiles(points_of(study()))
    assert [one.flops for one in with_others] == [one.flops for one in without]
    assert all(one.params.tolist() == two.params.tolist() for one, two in zip(with_others, without, strict=True))
    assert all(one.loss.tolist() == two.loss.tolist() for one, two in zip(with_others, without, strict=True))


def test_repeated_runs_count_by_the_mean_of_their_log_loss():
    apart = [(n, d, y + shift, s) for n, d, y, s in study() for shift in (-0.2, 0.3, -0.1)]
    for one, two in zip(profiles(points_of(apart)), profiles(points_of(study())), strict=True):
        np.testing.assert_allclose(one.loss, two.loss, rtol=1e-9)


def test_profiles_need_three_models_with_compute_in_common():
    assert profiles(points_of(study(SIZES[:2]))) == []
    assert len(profiles(points_of(study(SIZES[:3])))) == 9
    assert profiles(points_of(study((1e8, 1e9, 1e10), (1e9, 4e9)))) == []


@pytest.mark.parametrize(("horizons", "error"), [((1e9, 6e9, 36e9), 0.004), ((1e9, 3e9, 9e9, 36e9), 0.002)])
def test_between_horizons_a_loss_follows_its_curve(horizons, error):
    """Straight lines between horizons would be 0.024 and 0.010 off."""

    def law(n, d):
        return np.log(1.0 + 100 / n**0.3 + 4e4 / d**0.5)

    found = profiles(points_of(study(horizons=horizons, law=law)))
    off = [np.log(one.loss) - law(one.params, one.flops / (6 * one.params)) for one in found]
    assert np.abs(np.concatenate(off)).max() < error


def test_the_envelope_of_a_table():
    """In the order of N x D: 4, 6, 6, 8, 12, 20."""
    rows = [(10, 2, 1.0, 1), (2, 3, 2.5, 1), (1, 4, 3.0, 1), (8, 1, 2.7, 1), (4, 3, 2.5, 1), (6, 1, 2.4, 1)]
    assert envelope(points_of(rows)).tolist() == [2, 1, 5, 0]


def test_of_equal_runs_the_first_is_on_the_envelope():
    rows = [(n, 2, 3.0 - n, 1) for _ in range(50) for n in (2, 1)]
    assert envelope(points_of(rows)).tolist() == [1, 0]


def on_a_line(sizes=SIZES, *, worse_from=99):
    """Runs of 20 tokens a parameter, each the best of its compute, and worse ones with half and twice the tokens.

    From the size ``worse_from`` on nothing is better than what is smaller.
    """
    best = [(n, 20 * n, 40 / np.log(n) + 9.0 * (i >= worse_from), 1.0) for i, n in enumerate(sizes)]
    half = [(n, d / 2, y + 0.5, s) for n, d, y, s in best[1:]]
    return half + [(n, d * 2, y + 0.5, s) for n, d, y, s in best] + best


def test_the_power_law_of_the_envelope():
    """N = sqrt(C / 120). The mixture would be better than all with less compute, were it dense."""
    allocation = from_envelope(points_of([(7e7, 1e9, 0.5, 1.5), *on_a_line()]))
    assert allocation.approach == "envelope"
    assert allocation.exponent == pytest.approx(0.5, rel=1e-9)
    assert allocation.factor == pytest.approx(1 / np.sqrt(120), rel=1e-6)
    assert allocation.params.tolist() == list(SIZES)
    np.testing.assert_allclose(allocation.flops, [120 * n**2 for n in SIZES])


def test_an_envelope_needs_three_sizes():
    assert from_envelope(points_of(on_a_line(SIZES[:3]))).exponent == pytest.approx(0.5, rel=1e-9)
    assert from_envelope(points_of(on_a_line(worse_from=3))).exponent == pytest.approx(0.5, rel=1e-9)
    best = [(1e8, d, 3.0 - d / 1e11, 1.0) for d in HORIZONS]
    assert from_envelope(points_of(best + on_a_line(SIZES[1:], worse_from=1))) is None


def test_an_envelope_of_tokens_proportional_to_size_tells_nothing():
    proportional = [(n, 20 * n, 40 / np.log(n), 1.0) for n in SIZES]
    assert from_envelope(points_of(proportional)) is None


def test_no_envelope_without_dense_models():
    assert from_envelope(points_of([])) is None
    assert from_envelope(points_of([(n, d, y, 4.0) for n, d, y, _ in on_a_line()])) is None


def surface_of(alpha, beta, *, ln_a=6.0, ln_b=7.0, draws=None):
    names = ("ln_E", "ln_A", "alpha", "ln_B", "beta")
    theta = np.array([0.5, ln_a, alpha, ln_b, beta])
    return Surface(names, theta, theta[None] if draws is None else draws, "points", 0.0, 9, (1.0, 1.0, 1.0))


def test_the_allocation_of_a_surface():
    """Equation 4 of Hoffmann et al.: G = (alpha A / (beta B))^(1 / (alpha + beta)),
    N = G (C / 6)^(beta / (alpha + beta)).
    """
    allocation = from_surface(surface_of(0.34, 0.28, ln_a=np.log(406.4), ln_b=np.log(410.7)))
    assert allocation.approach == "surface"
    assert allocation.exponent == pytest.approx(0.4516, abs=1e-4)
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert allocation.factor * 5.76e23**allocation.exponent == pytest.approx(g * 9.6e22 ** (0.28 / 0.62), rel=1e-9)
    assert len(allocation.flops) == len(allocation.params) == 0


def test_the_interval_of_a_surface_is_that_of_its_resamples():
    """Exponents of 0, 0.01, ..., 1: 5 % lie beyond either end."""
    beta = np.linspace(0, 1, 101)
    draws = np.zeros((101, 5))
    draws[:, 2], draws[:, 4] = 3 * (1 - beta), 3 * beta
    assert from_surface(surface_of(0.3, 0.6, draws=draws)).interval == pytest.approx((0.05, 0.95))


@pytest.mark.parametrize(("alpha", "beta"), [(-0.3, 0.3), (0.3, -0.3), (-0.3, -0.3), (0.0, 0.3), (0.3, 0.0)])
def test_a_loss_that_does_not_fall_with_both_has_no_allocation(alpha, beta):
    with np.errstate(all="raise"):
        assert from_surface(surface_of(alpha, beta)) is None


@pytest.mark.parametrize("ln_a", [-500.0, 500.0])
def test_a_factor_that_no_number_holds_is_no_allocation(ln_a):
    """A^(1 / (alpha + beta)) is exp(1000) or its inverse."""
    with np.errstate(all="raise"):
        assert from_surface(surface_of(0.25, 0.25, ln_a=ln_a)) is None
        assert from_surface(surface_of(0.5, 0.5, ln_a=ln_a)) is not None
