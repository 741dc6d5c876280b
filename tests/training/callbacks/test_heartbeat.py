"""An attempt that a newer one has replaced ends by itself, and leaves the run's files to the newer one."""

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.metrics.performance_card import AttemptTime, write_card
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.heartbeat import AttemptSuperseded, HeartbeatCallback
from tests.distributed import jobs

NEWER = AttemptTime(2, 1, 0.0, 3, 7, 9.0, 1.0, 5.0, 0.0, 0.0, 0.0, 0.0)


def superseded(config: RunConfig, run_dir: Path) -> str:
    """Runs an attempt, and begins another once the first is training; returns how the first ended."""
    begun = threading.Thread(target=_begin_another, args=(run_dir,))
    begun.start()
    try:
        return f"exit code {jobs.attempt(config, run_dir)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        begun.join()


def _begin_another(run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"  # made before the first step, written after it
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    RunDirectory(run_dir).begin_attempt(world_size=1)
    write_card(run_dir / "performance.json", {"recipe": "of the newer attempt"}, [NEWER])


@pytest.fixture(scope="module")
def left(pool, tokens, tmp_path_factory) -> tuple[str, Path]:
    """How the first attempt ended, and its run directory."""
    run_dir = tmp_path_factory.mktemp("superseded") / "run"
    words = [f"data.path={tokens}", "training.train_iters=100000", "optim.lr_warmup_iters=0"]
    config = resolve("tiny_dense", words, RECIPES)
    RunDirectory(run_dir).claim(config)
    (ended,) = pool[1].run(superseded, config, run_dir)
    return ended, run_dir


def contents(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_it_ends_and_saves_nothing(left):
    ended, run_dir = left
    assert ended.startswith("AttemptSuperseded")
    assert "a newer attempt owns the run now" in ended
    assert list((run_dir / "checkpoints").glob("iter_*")) == []


def test_its_end_is_recorded_and_the_state_is_the_newer_ones(left):
    _, run_dir = left
    lines = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if "reason" in line] == ["superseded"]
    assert (contents(run_dir / "status.json")["state"], contents(run_dir / "status.json")["attempt"]) == ("running", 2)


def test_the_last_beat_is_of_its_training(left):
    assert contents(left[1] / "heartbeat.json")["phase"] == "training"


def test_the_card_is_the_newer_ones(left):
    card = contents(left[1] / "performance.json")
    assert card["recipe"] == "of the newer attempt"
    assert card["attempts"] == [asdict(NEWER)]


def trainer(*, next_stage: str) -> SimpleNamespace:
    """What the callback asks of a trainer."""
    reader = SimpleNamespace(stage=SimpleNamespace(name=next_stage))
    components = SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(train_iters=100)),
        progress=SimpleNamespace(consumed_samples=8, iteration=100),
        data=SimpleNamespace(at=lambda _: reader),
    )
    return SimpleNamespace(components=components)


def step(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(iteration=iteration, stage="main")


def test_the_first_step_of_a_data_stage_is_set_up(tmp_path):
    """Also after a save that comes between; and nothing follows the last step."""
    path = tmp_path / "heartbeat.json"
    callback = HeartbeatCallback(Heartbeat(path, attempt=1, resumed_at=0), is_current=lambda: True)
    for iteration in (1, 2, 3):
        callback.after_step(trainer(next_stage="main"), step(iteration))
        callback.on_phase(trainer(next_stage="main"), "validating")
        assert contents(path)["phase"] == "validating"
        callback.on_phase(trainer(next_stage="main"), None)
        assert contents(path)["phase"] == "training"
    assert contents(path)["seen"] == {"training": 5, "validating": 3}
    ends = trainer(next_stage="long")
    callback.after_step(ends, step(4))
    callback.on_phase(ends, "saving")
    callback.on_phase(ends, None)
    assert (contents(path)["phase"], contents(path)["seen"]["training"]) == ("starting", 0)
    callback.after_step(trainer(next_stage="main"), step(5))
    assert contents(path)["phase"] == "training"
    callback.after_step(ends, step(100))
    assert contents(path)["phase"] == "training"
    callback.after_training(ends)
    for phase in ("saving", None):
        callback.on_phase(ends, phase)
        assert contents(path)["phase"] == "finishing", "background saves say nothing of how long the last one takes"


def test_a_superseded_attempt_does_not_say_that_it_saves(tmp_path):
    path = tmp_path / "heartbeat.json"
    callback = HeartbeatCallback(Heartbeat(path, attempt=1, resumed_at=0), is_current=lambda: False)
    with pytest.raises(AttemptSuperseded):
        callback.on_phase(trainer(next_stage="main"), "saving")
    assert not path.exists()


def test_a_step_that_is_computed_again_beats_between_its_passes(tmp_path):
    """The longest of the phase is that of a pass."""
    heartbeat = Heartbeat(tmp_path / "heartbeat.json", attempt=1, resumed_at=3)
    heartbeat.beat("training", 3)
    heartbeat._written -= 2  # beats are at least a second apart
    callback = HeartbeatCallback(heartbeat, is_current=lambda: True)
    callback.before_rerun()
    beat = contents(tmp_path / "heartbeat.json")
    assert (beat["phase"], beat["iteration"], beat["count"], beat["seen"]) == ("training", 3, 2, {"training": 1})
