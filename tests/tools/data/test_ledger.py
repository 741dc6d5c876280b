"""``mq data ledger``: which samples a step saw."""

import json
import re

import pytest

from tests.conftest import run

BATCH = 4  # of tiny_dense


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_step_saw_the_samples_after_those_of_the_steps_before(step, finished_run):
    found = json.loads(run("tools.data", "ledger", finished_run, "--step", step, "--json", check=True).stdout)
    assert [one["sample"] for one in found] == list(range((step - 1) * BATCH, step * BATCH))
    for one in found:
        assert all(re.search(r"\.bin, documents? \d+", place) for place in one["places"]), one


def test_a_step_that_was_not_done(finished_run):
    done = run("tools.data", "ledger", finished_run, "--step", 9)
    assert done.returncode == 2
    assert "the run has not done this step" in done.stderr
