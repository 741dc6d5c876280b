"""``mq sweep`` asked for what is not there."""

import pytest

from tests.conftest import run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume", "nowhere"], "has no plan.yaml"),
        (["status", "nowhere"], "has no plan.yaml"),
        (["submit", "nowhere.yaml"], "cannot be read"),
        (["report", "nowhere.csv", "--output", "no/such/page.html"], "does not exist; create it first"),
        (["resume", "nowhere", "--at-once", "0", "--poll", "nan"], "--at-once"),
    ],
)
def test_what_cannot_be(words, said, tmp_path):
    action, place, *rest = words
    done = run("launch.sweep", action, tmp_path / place, *rest)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["fit", "report"])
def test_data_that_is_not_there(action, tmp_path):
    done = run("launch.sweep", action, tmp_path / "nowhere.csv")
    assert done.returncode == 3
    assert "cannot be read" in done.stderr
    assert not list(tmp_path.iterdir())
