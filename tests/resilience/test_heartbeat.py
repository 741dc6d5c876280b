"""The watchdog goes by what changes, and by its own clock."""

import pytest

from megatron_qwen.resilience.heartbeat import Beat, Heartbeat, Watchdog, read_beat
from megatron_qwen.resilience.phase_timeouts import PhaseTimeouts


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(path, clock, *, attempt=1):
    return Watchdog(lambda: read_beat(path), attempt=attempt, timeouts=PhaseTimeouts(100, 10), clock=clock)


def test_patience_before_the_first_step_and_after(tmp_path):
    clock, path = Clock(), tmp_path / "heartbeat.json"
    dog = watch(path, clock)
    clock.now = 99
    assert dog.silence() is None
    beat = Heartbeat(path, attempt=1, resumed_at=20)
    beat.beat("starting", 20)
    assert dog.silence() is None
    clock.now = 190
    assert dog.silence() is None, "starting is given as long as the start"
    beat.beat("training", 21)
    assert dog.silence() is None
    clock.now = 201
    assert "training after iteration 21" in dog.silence()


def test_a_start_that_never_comes(tmp_path):
    clock = Clock()
    dog = watch(tmp_path / "none.json", clock)
    clock.now = 101
    assert "before its first step" in dog.silence()


def test_beats_of_another_attempt_are_no_signs_of_life(tmp_path):
    clock, path = Clock(), tmp_path / "heartbeat.json"
    dog = watch(path, clock, attempt=2)
    Heartbeat(path, attempt=1, resumed_at=0).beat("training", 7)
    clock.now = 101
    assert dog.silence() is not None


def test_a_job_that_was_suspended_is_not_hung(tmp_path):
    clock, path = Clock(), tmp_path / "heartbeat.json"
    dog = watch(path, clock)
    Heartbeat(path, attempt=1, resumed_at=0).beat("training", 1)
    assert dog.silence() is None
    clock.now = 5000  # the watchdog stood still as well
    assert dog.silence() is None
    clock.now = 5011
    assert dog.silence() is not None


def test_at_most_one_beat_a_second_but_every_phase(tmp_path):
    path = tmp_path / "heartbeat.json"
    beat = Heartbeat(path, attempt=1, resumed_at=0)
    assert beat.due("training")
    beat.beat("training", 1)
    assert not beat.due("training")
    beat.beat("training", 2)
    assert read_beat(path).iteration == 1
    assert beat.due("finishing")
    beat.beat("finishing", 3)
    assert read_beat(path).iteration == 3
    path.write_text('{"attempt": 1, "ph')
    assert read_beat(path) is None


def test_each_phase_has_its_own_timeout(tmp_path):
    """A save may take longer than the steps have; the step after it may not."""
    clock, times = Clock(), {"longest_s": {"training": 1.0, "saving": 50.0}, "seen": {"training": 30, "saving": 3}}
    beats = [Beat(1, "training", 30, 0, 1, **times)]
    dog = Watchdog(lambda: beats[-1], attempt=1, timeouts=PhaseTimeouts(), clock=clock)
    assert dog.silence() is None
    beats.append(Beat(1, "saving", 30, 0, 2, **times))
    for clock.now in range(0, 901, 100):
        assert dog.silence() is None, "the save has 900 s"
    beats.append(Beat(1, "training", 30, 0, 3, **times))
    for clock.now in range(900, 1501, 100):
        assert dog.silence() is None
    clock.now = 1501
    assert dog.silence() == "no heartbeat for 600 s, training after iteration 30"


def test_what_an_earlier_attempt_has_shown_of_the_set_up(tmp_path):
    """Only if it had as many ranks."""
    beats = [Beat(1, "finishing", 30, 0, 9, 8, {"starting": 900.0})]
    for world_size, patience in ((8, 2700), (16, 1800)):
        clock = Clock()
        dog = Watchdog(lambda: beats[-1], attempt=2, timeouts=PhaseTimeouts(), world_size=world_size, clock=clock)
        for clock.now in range(0, patience, 100):
            assert dog.silence() is None
        clock.now = patience
        assert dog.silence() is None
        clock.now = patience + 1
        assert "before its first step" in dog.silence()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("megatron_qwen.resilience.heartbeat.time.monotonic", found)
    return found


def test_how_long_phases_take(tmp_path, clock):
    path = tmp_path / "heartbeat.json"
    beat = Heartbeat(path, attempt=1, resumed_at=0, world_size=4, age_s=30)
    for moment, phase in ((10, "starting"), (40, "training"), (42, "training"), (45, "saving"), (95, "training")):
        clock.now = moment
        beat.beat(phase, 1)
    found = read_beat(path)
    assert found.longest_s == {"starting": 70, "training": 3, "saving": 50}
    assert found.seen == {"starting": 1, "training": 2, "saving": 1}
    beat.forget("training")
    clock.now = 95 + 4000  # longer than any timeout, so the job was suspended
    beat.beat("saving", 2)
    assert read_beat(path).longest_s["training"] == 3
    assert read_beat(path).seen["training"] == 0
    more = Heartbeat(path, attempt=2, resumed_at=0, world_size=4)
    more.beat("starting", 0)
    assert (read_beat(path).longest_s["saving"], read_beat(path).seen) == (50, {})
    fewer = Heartbeat(path, attempt=3, resumed_at=0, world_size=2)
    fewer.beat("starting", 0)
    assert read_beat(path).longest_s == {}


def test_a_beat_of_an_earlier_version(tmp_path):
    path = tmp_path / "heartbeat.json"
    path.write_text('{"attempt": 1, "phase": "training", "iteration": 3, "resumed_at": 0, "count": 5}')
    assert read_beat(path).times.longest_s == {}
