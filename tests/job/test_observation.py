"""What monitoring reads from the files of a run."""

import json
import os

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.job.observation import RunObservation, SlowRank, observe
from megatron_qwen.metrics.performance_card import AttemptTime, write_card
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.rundir import RunDirectory, RunState


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    return found


def time_of(attempt: int, *, started: float, resumed_at: int, iteration: int, steps_s: float, wall_s: float):
    return AttemptTime(attempt, 2, started, resumed_at, iteration, wall_s, 5.0, steps_s, 0.0, 0.0, 1.0, 0.0)


def test_an_empty_directory(directory):
    assert observe(directory, clock=lambda: 7.0) == RunObservation(time=7.0, attempts=0)


def test_a_run_that_runs(directory):
    log = AttemptLog(directory.attempts)
    log.end(log.begin(), reason="hang", exclude=["n2"])
    log.begin()
    directory.write_status(RunState.RUNNING)
    steps = [{"iteration": n, "lm_loss": 5.0 - n, "tokens_per_second": 100.0 * n} for n in (1, 2)]
    steps[1] |= {"straggler_count": 9, "stragglers": [{"rank": 3, "node": "n2", "score": 0.5, "cause": "data"}]}
    directory.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"iteration": 3, "lm_l')
    os.utime(directory.metrics, (1150, 1150))
    Heartbeat(directory.heartbeat, attempt=2, resumed_at=0).beat("saving", 2)
    # Ten of twenty iterations of the first attempt were done again.
    first = time_of(1, started=1000, resumed_at=0, iteration=20, steps_s=40, wall_s=60)
    write_card(
        directory.performance, {}, [first, time_of(2, started=1100, resumed_at=10, iteration=20, steps_s=30, wall_s=40)]
    )
    found = observe(directory, clock=lambda: 1200.0)
    assert (found.iteration, found.loss, found.tokens_per_second) == (2, 3.0, 200.0)
    assert (found.stepped, found.phase, found.attempts, found.ends) == (1150, "saving", 2, {"hang": 1})
    assert found.excluded == 1, "while the next attempt runs"
    assert (found.stragglers, found.slow) == (9, (SlowRank(3, "n2", 0.5),))
    assert found.seconds["steps_done_again_s"] == 20
    assert found.seconds["between_attempts_s"] == 40
    assert found.goodput == (20 + 30) / 200, "the time since the card was written counts"
    log.end(2, reason="finished", exclude=["n2", "n3"])
    directory.write_status(RunState.DONE)
    done = observe(directory, clock=lambda: 9999.0)
    assert done.goodput == pytest.approx(50 / 140), "of a run that is over it stays"
    assert (done.tokens_per_second, done.phase, done.excluded, done.runs) == (None, None, 2, False)


@pytest.mark.parametrize("odd", [5, "text", [5], [{"rank": 1}], [{"rank": "x", "node": "", "score": 1}]])
def test_stragglers_that_make_no_sense(directory, odd):
    directory.write_status(RunState.RUNNING)
    directory.metrics.write_text(json.dumps({"iteration": 3, "stragglers": odd}) + "\n")
    found = observe(directory)
    assert (found.iteration, found.stragglers, found.slow) == (3, 0, ())


@pytest.mark.parametrize("text", ["", "[]", "5", '{"state": "odd"}', '{"avoid": 3, "state": 1}', "\x00"])
def test_files_that_make_no_sense(directory, text):
    for path in (directory.status, directory.metrics, directory.heartbeat, directory.performance, directory.attempts):
        path.write_text(text)
    found = observe(directory, clock=lambda: 7.0)
    assert (found.state, found.iteration, found.goodput, found.excluded) == (None, None, None, None)
