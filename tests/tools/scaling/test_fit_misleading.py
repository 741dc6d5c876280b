"""Data that look as if they said more than they do: the fit says what is missing and shows no certainty beyond it."""

import dataclasses
import json

import numpy as np
import pytest

from tests.conftest import run
from tests.tools.scaling.studies import Study
from tests.tools.scaling.test_surface import mixtures
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation, write_csv

FEW = Settings(draws=50)


def said(found, word):
    return any(word in note for note in found.notes)


def plain(n, d, *, noise=0.0, seed=0):
    """Losses of Chinchilla's law, without settings."""
    generator = np.random.default_rng(seed)
    loss = 1.8172 + 482.01 / np.asarray(n) ** 0.3478 + 2085.43 / np.asarray(d) ** 0.3658
    noisy = loss * np.exp(noise * generator.standard_normal(len(loss)))
    return [
        Observation(*row) for row in zip(np.asarray(n).tolist(), np.asarray(d).tolist(), noisy.tolist(), strict=True)
    ]


def test_one_cell_without_a_learning_rate_is_left_out():
    cells = Study(noise=0.002).draw(0)
    whole = fit(cells, FEW)
    stray = Observation(1e8, 2e9, 9.0)
    found = fit([*cells, stray], FEW)
    assert said(found, "1 observations without learning_rate")
    np.testing.assert_array_equal(found.surface.coefficients, whole.surface.coefficients)


def test_tokens_that_go_with_the_size_make_no_law():
    """D = 20 N, the commonest ladder: neither the loss nor the learning rate can be told apart in N and D."""
    n = np.exp(np.linspace(np.log(5e7), np.log(5e9), 12))
    found = fit(plain(n, 20 * n, noise=0.002), FEW)
    assert found.surface is None
    assert said(found, "proportional to size")
    assert not [one for one in found.allocations if one.approach == "envelope"]
    cells = Study(horizons=(20,), noise=0.002).draw(0)
    assert fit(cells, FEW).basin.features == ("1", "ln_N")
    jittered = [dataclasses.replace(one, tokens=one.tokens * (1 + 0.005 * (i % 3))) for i, one in enumerate(cells)]
    assert fit(jittered, FEW).basin.features == ("1", "ln_N")


def test_one_size_keeps_what_tokens_do():
    found = fit(Study(sizes=(1e8,), horizons=(5, 20, 80, 320), noise=0.001).draw(0), FEW)
    assert found.basin.features == ("1", "ln_D")
    assert found.basin.centre[1, 0] == pytest.approx(0.307, abs=0.1)
    assert not [one for one in found.allocations if one.approach == "envelope"]


def test_as_many_cells_as_coefficients_have_no_interval():
    cells = [Observation(1e8, 2e9, 3.0 + 0.1 * (i - 1.2) ** 2, learning_rate=2.0 ** (i - 9)) for i in range(3)]
    found = fit(cells, FEW)
    assert said(found, "its uncertainty cannot be estimated")
    assert not len(found.basin.draws)
    assert [one.low for one in found.optima] == [None]


def test_optima_beside_the_law_widen_its_intervals():
    """Every group's best learning rate a little off the law: exponents still lie in most of their 90 % intervals."""
    held = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        shifts: dict[tuple[float, float], float] = {}
        cells = []
        for one in Study(noise=0.0005, batches=0, rates=7, missing=0.0).draw(seed):
            shift = shifts.setdefault((one.params, one.tokens), 0.15 * generator.standard_normal())
            cells.append(dataclasses.replace(one, learning_rate=one.learning_rate * np.exp(shift)))
        found = fit(cells, Settings(draws=200, seed=seed))
        low, high = np.percentile(found.basin.draws[:, 1:, 0], [5, 95], axis=0)
        held.append((low <= [-0.713, 0.307]) & (high >= [-0.713, 0.307]))
    assert np.mean(held) >= 0.82


def test_mixtures_without_granularity():
    points = mixtures(0.001)
    rows = zip(points.params, points.tokens, np.exp(points.log_loss), points.sparsity, strict=True)
    cells = [Observation(n, d, loss, total_params=n * s if s > 1 else None) for n, d, loss, s in rows]
    found = fit(cells, FEW)
    assert "gamma" not in found.surface.names
    assert "sigma" in found.surface.names
    assert said(found, "no granularity")
    assert said(found, "do not determine gamma")


def test_a_loss_that_rises_has_no_law():
    n, d = np.meshgrid(np.exp(np.linspace(17, 21, 5)), np.exp(np.linspace(20, 24, 5)))
    cells = [Observation(a, b, 2 + 1e-9 * a**0.5 + 1e-9 * b**0.5) for a, b in zip(n.ravel(), d.ravel(), strict=True)]
    found = fit(cells, FEW)
    assert found.surface is None
    assert said(found, "no law is fitted")


def test_tokens_rounded_to_steps_are_one_horizon():
    cells = Study(noise=0.0).draw(0)
    generator = np.random.default_rng(0)
    rounded = [dataclasses.replace(one, tokens=one.tokens * (1 + 0.01 * generator.random())) for one in cells]
    assert len(fit(rounded, FEW).points.params) == len(fit(cells, FEW).points.params)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    write_csv(folder / "study.csv", Study(noise=0.002).draw(0))
    run("launch.sweep", "fit", str(folder / "study.csv"), "--draws", "100", check=True)
    return folder / "study.fit.json"


def prescribed(fitted, recipe, *words):
    done = run("launch.sweep", "prescribe", str(fitted), "--recipe", recipe, "--gpus", "16", *words, "--json")
    return done, json.loads(done.stdout) if done.returncode == 0 else None


def test_a_mixture_is_not_predicted_by_dense_models(fitted):
    _, answer = prescribed(fitted, "qwen1_5_moe_a2_7b", "--params", "2e9", "--tokens", "4e10")
    assert answer["loss"] is None
    assert any("was not varied" in warning for warning in answer["warnings"])
    done, _ = prescribed(fitted, "qwen1_5_moe_a2_7b", "--gpu-hours", "1000")
    assert done.returncode == 2


def test_what_the_nearest_shape_misses_is_said(fitted):
    done, _ = prescribed(fitted, "qwen2_5_7b", "--params", "1e3", "--tokens", "2e4")
    assert done.returncode == 2
    assert "far below" in done.stderr


def test_the_recipes_own_length_is_left_behind(fitted):
    words = ["--params", "1e9", "--tokens", "1e11", "optim.lr_decay_iters=100000"]
    _, answer = prescribed(fitted, "qwen2_5_7b", *words)
    assert "lr_decay_iters: null" in answer["run_yaml"]
    assert any("its own length" in warning for warning in answer["warnings"])


def test_the_interval_is_of_one_run(fitted):
    """A new run at the best settings lies in it about nine times of ten: the scatter is that of cells."""
    _, answer = prescribed(fitted, "qwen2_5_7b", "--params", "1e9", "--tokens", "4e10")
    low, high = answer["interval"]
    n, d = answer["params"], 4e10
    truth = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    runs = truth * np.exp(0.002 * np.random.default_rng(1).standard_normal(2000))
    assert ((runs > low) & (runs < high)).mean() > 0.8


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--delta", "inf"], 2, "--delta"),
        (["--window", "nan"], 2, "--window"),
        (["--seed", "-1"], 2, "--seed"),
        (["--output", "nowhere/fit.json"], 2, "does not exist"),
    ],
)
def test_options_that_cannot_be(words, code, text, tmp_path):
    write_csv(tmp_path / "study.csv", plain([1e8, 1e9], [1e9, 1e10]))
    done = run("launch.sweep", "fit", str(tmp_path / "study.csv"), *words)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("params,tokens,loss\n1e200,1e200,3\n", "at most"),
        ("params,tokens,loss\n1_0,1e9,3\n", "is not a number"),
        ("params,params,tokens,loss\n1e8,1e9,1e9,3\n", "name of two columns"),
        ("params,tokens,loss,total_params\n1e9,1e9,3,1e8\n", "is less than params"),
        ("params,tokens,loss\n1e8,1e9," + "3" * 200_000 + "\n", "CSV"),
        ("params,tokens,loss,status\n1e8,1e9,,diverged\n", "nothing to fit"),
    ],
)
def test_lines_that_cannot_be(text, word, tmp_path):
    (tmp_path / "study.csv").write_text(text)
    done = run("launch.sweep", "fit", str(tmp_path / "study.csv"))
    assert done.returncode == 3
    assert word in done.stderr
    assert "Traceback" not in done.stderr
