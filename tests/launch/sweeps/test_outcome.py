"""What became of a run, told from its directory."""

import json
import math

import numpy as np
import pytest

from launch.sweeps.outcome import astray_by, outcome
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.rundir import RunDirectory, RunState


def directory(tmp_path, losses, *, state=RunState.DONE, reason="finished", exit_code=0, validation=None):
    """A run that wrote these losses and ended so."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    lines = [{"iteration": number, "lm_loss": loss} for number, loss in enumerate(losses, start=1)]
    if validation is not None:
        lines[-1]["validation_loss"] = validation
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = AttemptLog(run.attempts)
    log.end(log.begin(world_size=1), exit_code=exit_code, reason=reason)
    run.write_status(state)
    return run.path


FALLING = list(np.linspace(6, 3, 100))


def test_done(tmp_path):
    found = outcome(directory(tmp_path, FALLING), iterations=100)
    assert found.status == "done"
    assert found.loss == pytest.approx(np.mean(FALLING[-5:]))
    assert found.measured == "mean of the last 5% of the steps"


def test_a_validation_at_the_end_is_the_loss(tmp_path):
    found = outcome(directory(tmp_path, FALLING, validation=3.5), iterations=100)
    assert (found.loss, found.measured) == (3.5, "validation")


def test_a_step_done_again_counts_once(tmp_path):
    path = directory(tmp_path, FALLING)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text(
        "\n".join([*lines[:60], '{"iteration": 50, "lm_loss": 99}', *lines[49:]]) + "\n"
    )
    assert outcome(path, iterations=100).loss == pytest.approx(np.mean(FALLING[-5:]))


@pytest.mark.parametrize("end", [[8.0] * 20, [math.nan] * 20])
def test_a_loss_that_goes_astray_has_diverged(end, tmp_path):
    """The same run before that is none: a branch that begins there is well."""
    path = directory(tmp_path, FALLING + end)
    assert outcome(path, iterations=120).status == "diverged"
    assert astray_by(path, 120) is not None
    assert astray_by(path, 100) is None


def test_a_spike_that_is_over_is_no_divergence(tmp_path):
    losses = list(FALLING)
    losses[50:55] = [9.0] * 5
    assert outcome(directory(tmp_path, losses), iterations=100).status == "done"


@pytest.mark.parametrize(
    ("state", "reason", "code", "status"),
    [
        (RunState.STOPPED, "numerics", 93, "diverged"),
        (RunState.STOPPED, "numerics error", 17, "diverged"),
        (RunState.STOPPED, "configuration", 93, "failed"),
        (RunState.CANCELLED, "cancelled", 143, "failed"),
        (RunState.RUNNING, None, None, "unfinished"),
        (RunState.REQUEUED, "preempted", 75, "unfinished"),
    ],
)
def test_by_the_policy(state, reason, code, status, tmp_path):
    path = directory(tmp_path, FALLING[:40], state=state, reason=reason, exit_code=code)
    found = outcome(path, iterations=100)
    assert found.status == status
    assert math.isnan(found.loss)


def test_done_with_metrics_that_end_early_has_failed(tmp_path):
    """Nothing would be gained by running it again, and it is no result."""
    found = outcome(directory(tmp_path, FALLING[:40]), iterations=100)
    assert found.status == "failed"
    assert "40 of 100" in found.why


def test_a_skipped_step_is_no_divergence(tmp_path):
    losses = [*FALLING[:-2], math.nan, FALLING[-1]]
    found = outcome(directory(tmp_path, losses), iterations=100)
    assert found.status == "done"
    assert found.loss == pytest.approx(np.nanmean(losses[-5:]))


def test_a_noisy_last_step_of_a_short_run_is_no_divergence(tmp_path):
    assert outcome(directory(tmp_path, [5.0, 4.0, 3.0, 3.0, 3.0, 2.9, 3.4]), iterations=7).status == "done"


def test_what_never_began(tmp_path):
    found = outcome(tmp_path / "nothing", iterations=10)
    assert (found.status, found.why) == ("unfinished", "not begun")
