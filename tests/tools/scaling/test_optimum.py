"""Best settings of single models, and the flaws of the grids they were sought on."""

import dataclasses

import numpy as np
import pytest

from tests.tools.scaling.studies import SETTING_LAWS, Study
from tools.scaling.basin import Cells
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import DIVERGED, Observation
from tools.scaling.optimum import EDGE_HIGH, EDGE_LOW, FEW, FLAT, Optimum, _judged, optima


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


# Seven places about zero. Over them 1, x, x^2 - 4 and the last are orthogonal (the textbook's orthogonal polynomials),
# and the squares of the third and the fourth add up to 84 and to 6.
PLACES = np.arange(-3.0, 4.0)
THIRD_DEGREE = np.array([-1.0, 1.0, 1.0, 0.0, -1.0, -1.0, 1.0])


def best_of(groups, *, spread=0.0, inside=None, blocked=None):
    """Optima of groups, each a pair of the logarithms of its settings [n, v] and ln L [n]."""
    settings = np.concatenate([one if one.ndim == 2 else one[:, None] for one, _ in groups])
    variables = ("learning_rate", "batch_tokens")[: settings.shape[1]]
    count = len(groups)
    group = np.repeat(np.arange(count), [len(loss) for _, loss in groups])
    cells = Cells(group, np.zeros(count), np.zeros(count), settings, variables, np.concatenate([y for _, y in groups]))
    inside = np.ones(len(group), dtype=bool) if inside is None else np.array(inside)
    blocked = np.zeros((count, len(variables)), dtype=bool) if blocked is None else np.array(blocked)
    return optima(cells, inside=inside, spread=spread, blocked_above=blocked)


def alone(places, loss, **options):
    """The optimum of one group of one setting."""
    (found,) = best_of([(places, np.asarray(loss, dtype=float))], **options)
    return found


def bowl(centre, places, curvature=(0.02, 0.03, 0.01)):
    """Settings of every pair of places, and a quadratic of them with this minimum."""
    settings = np.array([(x, y) for x in places for y in places])
    x, y = (settings - centre).T
    return settings, 1.0 + curvature[0] * x**2 + curvature[1] * y**2 + curvature[2] * x * y


def test_every_group_has_its_own_best_of_each_setting():
    """Cells outside the window have no part in the fit, but count as tried."""
    first, second = bowl((0.3, -0.4), PLACES[1:-1]), bowl((-1.1, 0.8), PLACES)
    inside = np.abs(np.concatenate((first[0], second[0]))).max(axis=1) < 3
    second[1][~inside[25:]] += 7.0
    nothing = np.zeros((0, 2)), np.zeros(0)
    found = best_of([first, nothing, second], inside=inside)
    assert [(one.group, one.variable, one.settings) for one in found] == [
        (0, "learning_rate", 5), (0, "batch_tokens", 5),
        (1, "learning_rate", 0), (1, "batch_tokens", 0),
        (2, "learning_rate", 7), (2, "batch_tokens", 7),
    ]  # fmt: skip
    assert [one.flags for one in found] == [(), (), (FEW,), (FEW,), (), ()]
    assert [one.value for one in found[2:4]] == [None, None]
    for one, centre in zip(found[:2] + found[4:], (0.3, -0.4, -1.1, 0.8), strict=True):
        np.testing.assert_allclose((one.value, one.low, one.high), np.exp(centre), rtol=1e-6)


def test_a_setting_that_was_not_varied():
    """Values that differ by rounding only are one."""
    rates = 0.5 + 1e-7 * PLACES
    rate, batch = best_of([(np.stack((rates, PLACES), axis=1), 0.02 * (PLACES + 2.9) ** 2)])
    assert rate == Optimum(0, "learning_rate", None, None, None, (FEW,), 1)
    assert batch.value == pytest.approx(np.exp(-2.9), rel=1e-6)
    assert (batch.variable, batch.flags, batch.settings) == ("batch_tokens", (), 7)
    assert alone(rates, 0.02 * PLACES**2) == Optimum(0, "learning_rate", None, None, None, (FEW,), 1)


@pytest.mark.parametrize(
    ("loss", "blocked", "flags"),
    [
        ((1.0, 2.0), False, (FEW, EDGE_LOW)),
        ((1.0, 2.0), True, (FEW, EDGE_LOW)),
        ((2.0, 1.0), False, (FEW, EDGE_HIGH)),
        ((2.0, 1.0), True, (FEW,)),
        ((2.0, 1.0, 2.0), False, (FEW,)),
    ],
)
def test_too_few_for_a_quadratic_still_tell_the_end_they_are_best_at(loss, blocked, flags):
    """The best is of all cells, whether or not they lie in the window: here but the first two do."""
    inside = [True, True, False][: len(loss)]
    found = alone(PLACES[: len(loss)], loss, inside=inside, blocked=[[blocked]], spread=0.01)
    assert found == Optimum(0, "learning_rate", None, None, None, flags, len(loss))


def test_three_cells_make_a_quadratic_where_the_noise_is_known():
    loss = 0.02 * (PLACES[:4] + 1.9) ** 2
    assert alone(PLACES[:3], loss[:3]).flags == (FEW,)
    assert alone(PLACES[:3], loss[:3], spread=1e-4).value == pytest.approx(np.exp(-1.9), rel=1e-6)
    assert alone(PLACES[:4], loss).value == pytest.approx(np.exp(-1.9), rel=1e-6)


def test_cells_on_a_line_do_not_tell_two_settings_apart():
    line = np.stack((PLACES, PLACES), axis=1)
    assert [one.flags for one in best_of([(line, 0.02 * PLACES**2)])] == [(FEW,), (FEW,)]


@pytest.mark.parametrize(("share", "flags"), [(0.99, ()), (1.01, (FLAT,))])
@pytest.mark.parametrize("source", ["the groups", "the cells"])
def test_a_curvature_of_two_standard_errors_is_one(source, share, flags):
    """Its standard error is s / sqrt(84); s^2 = (residuals^2 + 5 spread^2) / (7 - 3 coefficients + 5)."""
    s = share * 0.02 / 2 * np.sqrt(84)
    spread = s * np.sqrt(9 / 5) if source == "the groups" else 0.0
    scatter = s * np.sqrt(9 / 6) * THIRD_DEGREE if source == "the cells" else 0.0
    found = alone(PLACES, 0.02 * PLACES**2 + scatter, spread=spread)
    assert found.flags == flags
    assert found.value == (None if flags else pytest.approx(1.0))


def test_one_setting_can_be_flat_and_the_other_not():
    for curvature, flags in (((0.02, 1e-4, 0), [(), (FLAT,)]), ((1e-4, 0.02, 0), [(FLAT,), ()])):
        assert [one.flags for one in best_of([bowl((0, 0), PLACES, curvature)], spread=0.01)] == flags


def test_the_interval_is_that_of_the_vertex():
    """A vertex -b / 2a has the standard error s / (2 a sqrt(sum of x^2)) where b is zero; 1.645 of them are 5 %."""
    spread = 0.005
    found = alone(PLACES + 5, 0.02 * PLACES**2, spread=spread)
    error = spread * np.sqrt(5 / 9) / (2 * 0.02 * np.sqrt(28))
    away = np.log((found.low, found.high)) - 5
    np.testing.assert_allclose(away, (-1.645 * error, 1.645 * error), rtol=0.08)
    assert found == alone(PLACES + 5, 0.02 * PLACES**2, spread=spread)


def test_the_interval_leaves_5_percent_at_either_end():
    found = _judged(0, "learning_rate", 0.0, np.log(np.arange(1.0, 102.0)), True, np.log([1.0, 20.0]), False)
    assert (found.low, found.high) == pytest.approx((6.0, 96.0), rel=1e-3)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_best_is_sought_up_to_ten_times_beyond_what_was_tried(side):
    """At nine times the largest value it is said; at eleven times, and for its interval, ten times is."""
    edge, end = (EDGE_LOW if side < 0 else EDGE_HIGH), 3.0
    for factor, known in ((9.0, 9.0), (11.0, 10.0)):
        centre = side * (end + np.log(factor))
        found = alone(PLACES, 0.02 * (PLACES - centre) ** 2)
        expected = np.exp(side * (end + np.log(known)))
        np.testing.assert_allclose((found.value, found.low, found.high), expected, rtol=1e-6)
        assert found.flags == (edge,)


def test_divergence_above_counts_for_its_own_group_and_setting():
    above, below = bowl((3.5, 3.5), PLACES), bowl((-3.5, -3.5), PLACES)
    found = best_of([above, above, below], blocked=[[True, False], [False, True], [True, True]])
    assert [one.flags for one in found] == [(), (EDGE_HIGH,), (EDGE_HIGH,), (), (EDGE_LOW,), (EDGE_LOW,)]


def test_no_minimum_has_no_value_and_what_was_tried_for_an_interval():
    found = alone(PLACES, -0.02 * (PLACES - 0.5) ** 2)
    assert found.value is None
    assert found.flags == (FLAT, EDGE_LOW)
    assert np.log((found.low, found.high)) == pytest.approx((-2.7, 2.7))  # 5 and 95 % of the way from -3 to 3


def test_a_saddle_has_no_value_in_either_setting():
    found = best_of([bowl((0, 0), PLACES, (0.02, -0.01, 0))])
    assert [one.value for one in found] == [None, None]
    assert all(FLAT in one.flags for one in found)


def test_where_most_resamples_have_no_minimum_the_best_that_was_tried_stands_for_it():
    """The vertex lies below all places, but the noise hides both curvatures, and a cell inside has the least loss."""
    settings, loss = bowl((-5, -5), PLACES, (1e-5, 1e-5, 0))
    loss[(settings == -2).all(axis=1)] -= 1e-3
    found = best_of([(settings, loss)], spread=0.1)
    assert [one.flags for one in found] == [(FLAT,), (FLAT,)]
    assert [one.value for one in found] == [None, None]
    for one in found:  # its interval reaches beyond what was tried
        assert np.log(one.low) < -3
        assert np.log(one.high) > 3
