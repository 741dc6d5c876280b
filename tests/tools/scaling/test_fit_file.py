"""A fit as a file: constants beside their logarithms, and files of earlier versions."""

import json
import math

import numpy as np
import pytest

from tests.tools.scaling.studies import LOSS_LAWS, SETTING_LAWS, Study
from tools.scaling import fit_file
from tools.scaling.fit import Settings, fit
from tools.scaling.fit_file import FitFile
from tools.scaling.observations import Observation

# Of 21 values in order the 5th and the 95th percentile are the second and the last but one: no value is interpolated.
DRAWS = 21


@pytest.fixture(scope="module")
def content():
    """As a program reads it from the file."""
    return read(fit(Study(noise=0.005).draw(0), Settings(draws=DRAWS)))


def read(found):
    return json.loads(json.dumps(fit_file.document(found, source="drawn"), allow_nan=False))


def by_hand(logs):
    """The ends of the 90 % interval of what these are the logarithms of."""
    assert len(logs) == DRAWS
    ordered = sorted(logs)
    return math.exp(ordered[1]), math.exp(ordered[-2])


def assert_constants(surface):
    """E, A and B follow from value and draws of their logarithms."""
    assert list(surface["constants"]) == ["E", "A", "B"]
    for name, found in surface["constants"].items():
        index = list(surface["coefficients"]).index(f"ln_{name}")
        low, high = by_hand([draw[index] for draw in surface["draws"]])
        assert found["value"] == pytest.approx(math.exp(surface["coefficients"][f"ln_{name}"]["value"]), rel=1e-12)
        assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6)  # draws are rounded in the file
        assert found["low"] < found["value"] < found["high"]


def test_constants_of_the_loss(content):
    assert_constants(content["surface"])


def test_constants_of_a_law_of_mixtures():
    cells = []
    generator = np.random.default_rng(0)
    for n in (1e8, 4e8, 16e8):
        for d in (2e9, 8e9, 32e9):
            for sparsity, granularity in ((1.0, 1.0), (4.0, 1.0), (8.0, 4.0), (16.0, 2.0)):
                loss = 1.7 + 400 / (n**0.34 * sparsity**0.1 * granularity**0.05) + 410 / d**0.28
                noisy = loss * math.exp(0.003 * generator.standard_normal())
                cells.append(Observation(n, d, noisy, total_params=sparsity * n, granularity=granularity))
    surface = read(fit(cells, Settings(draws=DRAWS)))["surface"]
    assert {"sigma", "gamma"} <= surface["coefficients"].keys()
    assert_constants(surface)


def test_without_noise_they_are_those_of_the_law():
    found = read(fit(Study().draw(1), Settings(draws=DRAWS)))
    constants = found["surface"]["constants"]
    e, a, _, b, _ = LOSS_LAWS["besiroglu"]
    assert [constants[name]["value"] for name in "EAB"] == pytest.approx([e, a, b], rel=1e-5)
    (rate, *_), (batch, *_) = SETTING_LAWS["step law"]
    factors = found["settings_laws"]["factors"]
    assert factors["learning_rate"]["value"] == pytest.approx(rate, rel=1e-5)
    assert factors["batch_tokens"]["value"] == pytest.approx(batch, rel=1e-5)


def test_factors_of_the_settings(content):
    laws = content["settings_laws"]
    assert list(laws["factors"]) == laws["variables"] == ["learning_rate", "batch_tokens"]
    lines = fit_file.setting_laws(laws)
    for v, found in enumerate(laws["factors"].values()):
        low, high = by_hand([draw[0][v] for draw in laws["draws"]])
        assert found["value"] == pytest.approx(math.exp(laws["centre"][0][v]), rel=1e-12)
        assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6)
        assert f" = {found['value']:.4g} ({found['low']:.3g} to {found['high']:.3g}) N^" in lines[v]


def test_as_many_cells_as_coefficients_have_no_interval():
    """A parabola through three cells, vertex at 2^-7.8: nothing is left over that tells how sure it is."""
    cells = [Observation(1e8, 2e9, 3.0 + 0.1 * (i - 1.2) ** 2, learning_rate=2.0 ** (i - 9)) for i in range(3)]
    laws = read(fit(cells, Settings(draws=DRAWS)))["settings_laws"]
    found = laws["factors"]["learning_rate"]
    assert (found["low"], found["high"]) == (None, None)
    assert found["value"] == pytest.approx(2**-7.8, rel=0.02)
    assert fit_file.setting_laws(laws) == [f"best learning_rate = {found['value']:.4g}"]


def test_the_constants_are_what_people_are_shown(content):
    text = fit_file.table(content)
    for name, found in content["surface"]["constants"].items():
        assert f"{name:<6}{found['value']:>12.5g}   {found['low']:.5g} to {found['high']:.5g}" in text
    assert "ln_" not in text


def test_a_file_of_an_earlier_version(content, tmp_path):
    """It has the logarithms only; laws and texts are the same."""
    before = json.loads(json.dumps(content))
    del before["surface"]["constants"], before["settings_laws"]["factors"]
    fit_file.write(tmp_path / "new.json", content)
    fit_file.write(tmp_path / "old.json", before)
    new, old = FitFile(tmp_path / "new.json"), FitFile(tmp_path / "old.json")
    np.testing.assert_array_equal(new.surface.coefficients, old.surface.coefficients)
    assert new.surface.names == old.surface.names
    np.testing.assert_array_equal(new.basin.draws, old.basin.draws)
    assert fit_file.table(before) == fit_file.table(content)
