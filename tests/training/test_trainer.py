"""The loop: ramps of the batch, a profiler window and saves in the background in one run; the clock of callbacks."""

import time
from types import SimpleNamespace

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.checkpoint.write import SaveError
from megatron_qwen.errors import NumericsError, Problem, SilentCorruptionError
from megatron_qwen.resilience.heartbeat import read_beat
from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.trainer import Trainer
from tests.training.attempts import attempt, configure


def test_batch_ramp_and_profile_and_background_saves(pool, tokens, tmp_path):
    overrides = [
        "training.rampup_batch_size=[2, 2, 6]", "training.train_iters=6", "metrics.profile_start=3",
        "metrics.profile_iters=2", "checkpoint.save_interval=2", "checkpoint.async_save=true", "checkpoint.keep_last=2",
        "training.eval_iters=0",
    ]  # fmt: skip
    records = attempt(pool, 2, configure("tiny_dense", tokens, *overrides), tmp_path / "run")
    assert [record["global_batch_size"] for record in records] == [2, 2, 4, 4, 4, 4]
    assert [record["consumed_samples"] for record in records] == [2, 4, 8, 12, 16, 20]
    assert all("validation_loss" not in record for record in records)
    assert [iteration for iteration, _ in committed(tmp_path / "run" / "checkpoints")] == [6, 4]
    assert read_beat(tmp_path / "run" / "heartbeat.json").seen["saving"] in (3, 4, 5), "and commits between"
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert traces == ["rank_0.json.gz", "rank_1.json.gz"]


class Saves(Callback):
    timed_as = "save"

    def after_step(self, trainer, record):
        time.sleep(0.02)


class Fails(Callback):
    timed_as = "validation"

    def after_step(self, trainer, record):
        raise OSError


def test_time_in_callbacks_counts_as_what_they_are_timed_as():
    """Two of a kind add up, one of no kind does not count, and one that fails has taken its time too."""
    trainer = Trainer(SimpleNamespace(), [Saves(), Callback(), Saves(), Fails()])
    with pytest.raises(OSError):
        trainer.call_after_step(SimpleNamespace())
    assert trainer.callback_seconds.keys() == {"save", "validation"}
    assert trainer.callback_seconds["save"] > 0.04


class Hears(Callback):
    def __init__(self):
        self.heard = []

    def on_phase(self, trainer, phase):
        self.heard.append(phase)


class Enters(Callback):
    def after_step(self, trainer, record):
        if record.iteration == 2:
            trainer.enter("validating")


def test_a_phase_ends_with_the_hook_that_began_it():
    hears = Hears()
    trainer = Trainer(SimpleNamespace(), [hears, Enters(), Callback()])
    for iteration in (1, 2, 3):
        trainer.call_after_step(SimpleNamespace(iteration=iteration))
    assert hears.heard == ["validating", None]


class Raises(Callback):
    """Ends training in its hook."""

    def __init__(self, error):
        self.error, self.seen = error, []

    def before_training(self, trainer):
        raise self.error

    def on_phase(self, trainer, phase):
        self.seen.append(phase)

    def on_numerics_error(self, *_):
        self.seen.append("commit")


@pytest.mark.parametrize(
    ("error", "seen"), [(NumericsError("not finite"), ["saving", "commit"]), (OSError("full"), [])]
)
def test_the_commit_after_a_numerics_error_is_a_save(error, seen):
    """With the timeout of one, not that of a step."""
    config = SimpleNamespace(training=SimpleNamespace(train_iters=1))
    components = SimpleNamespace(config=config, loader=SimpleNamespace(close=lambda: None))
    raises = Raises(error)
    with pytest.raises(type(error)):
        Trainer(components, [raises]).fit()
    assert raises.seen == seen


class Fit(Trainer):
    """Meets a faulty rank in its first step."""

    def step(self):
        raise SilentCorruptionError(Problem("rank 1", None, "is faulty."), suspects=[1])


class CannotSave(Callback):
    def on_numerics_error(self, error):
        raise SaveError(Problem("checkpoints", None, "No space left on device."))


class Told(Callback):
    def __init__(self):
        self.errors = []

    def on_numerics_error(self, error):
        self.errors.append(type(error))


def test_what_fails_at_a_faulty_ranks_end_does_not_hide_it(caplog):
    told = Told()
    components = SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(train_iters=5)),
        progress=SimpleNamespace(iteration=0),
        loader=SimpleNamespace(close=lambda: None),
    )
    with pytest.raises(SilentCorruptionError) as raised:
        Fit(components, [CannotSave(), told]).fit()
    assert raised.value.suspects == (1,)
    assert told.errors == [SilentCorruptionError]
    assert "No space left on device" in caplog.text
