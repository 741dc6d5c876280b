"""The charts of a report hold what the fit found, and are left out where there is nothing to show."""

import json
import math

import numpy as np
import pytest

from tests.tools.scaling.studies import LOSS_LAWS, Study
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation
from tools.scaling.report import vega
from tools.scaling.report.charts import charts


@pytest.fixture(scope="module")
def study():
    cells = Study(noise=0.0, missing=0.0, sizes=(1e8, 2e8, 4e8, 8e8, 1.6e9)).draw(0)
    return cells, fit(cells, Settings(draws=50))


def rows(chart, layer=0):
    return chart.spec["layer"][layer]["data"]["values"]


def named(study):
    return {chart.name: chart for chart in charts(*study)}


def test_a_study_has_all_charts(study):
    assert list(named(study)) == [
        "loss_over_compute", "isoflops", "allocation", "loss_over_learning_rate", "best_learning_rate",
        "loss_over_batch_tokens", "best_batch_tokens", "residuals",
    ]  # fmt: skip


def test_every_done_cell_is_a_point_and_no_other(study):
    cells, _ = study
    done = [one for one in cells if one.status == "done"]
    shown = rows(named(study)["loss_over_compute"])
    assert len(shown) == len(done) < len(cells)
    assert [row["loss"] for row in shown] == pytest.approx([one.loss for one in done], rel=1e-5)
    assert [row["flops"] for row in shown] == pytest.approx([6 * one.params * one.tokens for one in done], rel=1e-5)


def test_the_frontier_is_the_law_at_its_best_size(study):
    e, a, alpha, b, beta = LOSS_LAWS["besiroglu"]
    frontier = rows(named(study)["loss_over_compute"], 3)
    for row in frontier[::8]:
        sizes = np.exp(np.linspace(np.log(1e5), np.log(1e12), 20_000))
        losses = e + a / sizes**alpha + b / (row["flops"] / (6 * sizes)) ** beta
        assert row["loss"] == pytest.approx(float(losses.min()), rel=1e-4)
        assert row["params"] == pytest.approx(float(sizes[losses.argmin()]), rel=0.01)


def test_without_noise_there_is_nothing_left_over(study):
    assert max(abs(row["away"]) for row in rows(named(study)["residuals"])) < 1e-3


def test_the_law_of_the_settings_goes_through_the_best_of_each(study):
    chart = named(study)["best_learning_rate"]
    for row in rows(chart):
        assert row["value"] == pytest.approx(1.79 * row["params"] ** -0.713 * row["tokens"] ** 0.307, rel=0.01)
    law = rows(chart, 2)
    assert len({row["tokens"] for row in law}) <= 4
    for row in law[::7]:
        assert row["value"] == pytest.approx(1.79 * row["params"] ** -0.713 * row["tokens"] ** 0.307, rel=0.01)


def test_a_cell_that_blew_up_does_not_flatten_the_rest(study):
    cells, fitted = study
    blown = Observation(1e7, 5e7, 11.0, learning_rate=1.0, batch_tokens=1e5)
    chart = {one.name: one for one in charts([*cells, blown], fitted)}["loss_over_compute"]
    low, high = chart.spec["encoding"]["y"]["scale"]["domain"]
    worst = math.exp(fitted.points.log_loss.max())
    assert high == pytest.approx(1.12 * worst, rel=1e-4)
    assert "zoom out to see them" in chart.caption
    assert low < min(one.loss for one in cells if one.status == "done")


def test_nothing_is_said_to_lie_beyond_where_nothing_does(study):
    cells, fitted = study
    near = [one for one in cells if one.status != "done" or one.loss < 1.1 * math.exp(fitted.points.log_loss.max())]
    assert all("zoom out" not in chart.caption for chart in charts(near, fitted))


def lines(chart):
    """Points by line of a chart of settings."""
    found = {}
    for row in rows(chart):
        found.setdefault(row["group"], []).append(row)
    return found


def test_batches_that_make_horizons_a_little_longer_are_one_line():
    steps = [(0.9984, 256), (1.0, 512), (1.0035, 1024)]
    cells = [
        Observation(n, d * factor, 3 + 1e3 / n**0.5 + 1e3 / d**0.5 + 0.02 * math.log(rate / 2e-3) ** 2 + batch * 1e-6,
                    learning_rate=rate, batch_tokens=batch)
        for n in (1e5, 3e5, 9e5) for d in (1e6, 3e6, 9e6) for rate in (1e-3, 2e-3, 4e-3) for factor, batch in steps
    ]  # fmt: skip
    drawn = {chart.name: chart for chart in charts(cells, fit(cells, Settings(draws=5)))}
    for line in lines(drawn["loss_over_learning_rate"]).values():
        assert [row["learning_rate"] for row in line] == [1e-3, 2e-3, 4e-3]
    assert len(lines(drawn["loss_over_learning_rate"])) == 9
    assert all(len(line) == 3 for line in lines(drawn["loss_over_batch_tokens"]).values())


def test_a_mixture_and_a_dense_model_of_the_same_size_are_two_lines():
    cells = [
        Observation(n, d, 3 + 1e3 / n**0.5 + 1e3 / d**0.5 - (0.1 if total else 0) + 0.02 * math.log(rate / 2e-3) ** 2,
                    learning_rate=rate, total_params=total and 8 * n, granularity=total and 1.0)
        for n in (1e5, 3e5, 9e5) for d in (1e6, 3e6, 9e6) for rate in (1e-3, 2e-3, 4e-3) for total in (None, 1)
    ]  # fmt: skip
    found = charts(cells, fit(cells, Settings(draws=5)))
    chart = next(one for one in found if one.name == "loss_over_learning_rate")
    assert len(lines(chart)) == 18
    assert "of dense models" in found[0].caption


@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_numbers_of_any_size_make_a_page(unit):
    """D in billions; and losses that fall all the way, whose optimum is far away."""
    cells = [
        Observation(n / unit, d / unit, (3 + 1e3 / n**0.5 + 1e3 / d**0.5) * rate**-0.1, learning_rate=rate)
        for n in (1e8, 3e8, 9e8)
        for d in (2e9, 6e9, 2e10)
        for rate in (1e-3, 2e-3, 4e-3, 8e-3)
    ]
    for chart in charts(cells, fit(cells, Settings(draws=5))):
        json.dumps(chart.spec, allow_nan=False)
        assert all(layer["data"]["values"] for layer in chart.spec["layer"])


def test_without_a_fit_or_without_settings():
    cells = [Observation(1e6, 1e8, 3.0), Observation(2e6, 1e8, 2.9), Observation(1e6, 1e8, math.nan, "failed")]
    assert [chart.name for chart in charts(cells, None)] == ["loss_over_compute"]
    assert [chart.name for chart in charts(cells, fit(cells, Settings(draws=5)))] == ["loss_over_compute"]
    assert charts([cells[2]], None) == []


def test_every_chart_can_be_drawn(study):
    for chart in charts(*study):
        assert vega.svg(chart.spec).startswith("<svg")
