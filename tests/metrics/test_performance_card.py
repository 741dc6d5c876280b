"""The card adds up: every second of every attempt is of one kind, and steps done again count once."""

import json

import pytest

from megatron_qwen.metrics.performance_card import AttemptTime, goodput, read_attempts, write_card

FIRST = AttemptTime(
    attempt=1,
    devices=8,
    started=1000.0,
    resumed_at=0,
    iteration=120,
    wall_s=200.0,
    startup_s=20.0,
    steps_s=120.0,
    skipped_s=5.0,
    data_wait_s=10.0,
    save_s=15.0,
    validation_s=20.0,
)
SECOND = AttemptTime(
    attempt=2,
    devices=8,
    started=1300.0,
    resumed_at=100,
    iteration=200,
    wall_s=130.0,
    startup_s=20.0,
    steps_s=100.0,
    skipped_s=0.0,
    data_wait_s=0.0,
    save_s=0.0,
    validation_s=0.0,
)


def test_all_time_is_accounted_for():
    found = goodput([FIRST, SECOND])
    whole = SECOND.started + SECOND.wall_s - FIRST.started
    assert sum(value for name, value in found.items() if name != "share") == pytest.approx(whole)
    assert found["steps_done_again_s"] == pytest.approx(20.0)  # 20 of 120 steps of a second each
    assert found["steps_s"] == pytest.approx(200.0)
    assert found["between_attempts_s"] == pytest.approx(100.0)
    assert found["other_s"] == pytest.approx(20.0)
    assert found["share"] == pytest.approx(200.0 / whole)


def test_an_attempt_from_another_beginning_loses_all_of_the_one_before():
    anew = AttemptTime(**{**SECOND.__dict__, "resumed_at": 0})
    assert goodput([FIRST, anew])["steps_done_again_s"] == FIRST.steps_s
    assert goodput([])["share"] == 0.0


def test_a_later_fall_back_counts_too():
    """The second attempt dies at once; the third begins before where the first ended."""
    died = AttemptTime(**{**SECOND.__dict__, "resumed_at": 120, "iteration": 120, "steps_s": 0.0})
    third = AttemptTime(**{**SECOND.__dict__, "attempt": 3, "started": 1500.0})
    assert goodput([FIRST, died, third])["steps_done_again_s"] == pytest.approx(20.0)


def test_the_file_keeps_earlier_attempts(tmp_path):
    path = tmp_path / "performance.json"
    assert read_attempts(path) == []
    write_card(path, {"device": "CPU"}, [FIRST])
    write_card(path, {"device": "CPU"}, [*read_attempts(path), SECOND])
    assert read_attempts(path) == [FIRST, SECOND]
    assert json.loads(path.read_text())["goodput"] == goodput([FIRST, SECOND])
    path.write_text("{")
    assert read_attempts(path) == []
