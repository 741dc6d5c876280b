"""The loop: ramps of the batch, a profiler window and saves in the background in one run; the clock of callbacks."""

import time
from types import SimpleNamespace

import pytest

from megatron_qwen.checkpoint.paths import committed
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
