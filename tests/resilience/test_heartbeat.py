"""The watchdog goes by what changes, and by its own clock."""

from megatron_qwen.resilience.heartbeat import Heartbeat, Watchdog, read_beat


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(path, clock, *, attempt=1):
    return Watchdog(lambda: read_beat(path), attempt=attempt, start_s=100, step_s=10, clock=clock)


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
