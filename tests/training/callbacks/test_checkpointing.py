"""Saves in the background: whatever fails there ends the run, and nobody leaves before they are committed."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.checkpointing import Checkpointing
from tests.conftest import small_disk
from tests.rank_pool import rank_info


@pytest.fixture
def config(tokens) -> RunConfig:
    words = ["training.train_iters=6", "training.eval_iters=0", "training.global_batch_size=2"]
    words += ["checkpoint.save_interval=2", "checkpoint.async_save=true", "metrics.tensorboard=false"]
    return resolve("tiny_dense", [f"data.path={tokens}", *words], RECIPES)


def end_of(config: RunConfig, run_dir: Path, stopped: bool) -> Any:
    """Exit code of an attempt, or what it said when it failed."""
    from megatron_qwen.errors import UserError
    from megatron_qwen.resilience.signals import StopSignals
    from megatron_qwen.training.attempt import run_attempt

    signals = StopSignals()
    if stopped:
        signals.received = signal.SIGTERM
    try:
        return run_attempt(config, rank_info(), signals, run_dir)
    except UserError as error:
        return f"{error.exit_code} {error.render()}"


def test_a_full_disk_is_noticed(pool, config, tmp_path):
    with small_disk(tmp_path / "disk", "6m") as disk:  # a checkpoint takes 3.4 MiB
        run = RunDirectory(tmp_path / "run")
        run.claim(config)
        run.checkpoints.symlink_to(disk, target_is_directory=True)
        answers = pool[2].run(end_of, config, run.path, False)
        assert answers[0] == answers[1]
        assert answers[0].startswith("1 checkpoint not saved: ")
        assert "No space left on device" in answers[0]
        assert [iteration for iteration, _ in committed(run.checkpoints)] == [2]


def test_who_is_asked_to_stop_commits_first(pool, config, tmp_path):
    """The signal comes in the step whose save begins."""
    run = RunDirectory(tmp_path / "run")
    config = config.with_section("checkpoint", save_interval=1)
    run.claim(config)
    assert pool[2].run(end_of, config, run.path, True) == [75, 75]
    assert [iteration for iteration, _ in committed(run.checkpoints)] == [1]


class Writer:
    """A writer whose pending save is written after two looks."""

    def __init__(self) -> None:
        self.newest: int | None = None
        self.did: list[str] = []

    def is_written(self) -> bool:
        self.did.append("look")
        return self.did.count("look") == 2

    def finish(self) -> None:
        self.did.append("commit")


def test_the_commit_of_a_background_save_is_a_save():
    """It waits for the file system, with the timeout of a save and not that of a step."""
    writer = Writer()
    checkpoint = SimpleNamespace(async_save=True)
    trainer = SimpleNamespace(
        components=SimpleNamespace(config=SimpleNamespace(checkpoint=checkpoint)), enter=writer.did.append
    )
    schedule = SimpleNamespace(is_due=lambda iteration, step_time_s: False)
    callback = Checkpointing(writer, schedule=schedule, saved=0, tokenizer=None)
    for iteration in (1, 2, 3):
        callback.after_step(trainer, SimpleNamespace(iteration=iteration, step_time_s=1.0))
    assert writer.did == ["look", "look", "saving", "commit", "look"]
