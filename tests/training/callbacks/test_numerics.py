"""A run of steps whose numbers are not finite ends, and keeps its checkpoint."""

import json
import re
from types import SimpleNamespace

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.errors import NumericsError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.training.callbacks.numerics import NumericsGuard
from tests.conftest import run


def test_the_run_ends_with_17_and_keeps_its_checkpoint(tokens, tmp_path):
    run_dir = tmp_path / "run"
    wild = ["optim.learning_rate=1e30", "optim.clip_grad=0", "optim.lr_warmup_iters=0", "optim.lr_decay_style=constant"]
    settings = ["training.train_iters=50", "checkpoint.save_interval=1", "resilience.max_consecutive_skips=3"]
    words = [f"data.path={tokens}", *wild, *settings, "--run-dir", run_dir]
    done = run("launch.train", "tiny_dense", *words)
    assert done.returncode == 17, done.stderr
    assert "numerics error" in done.stderr
    assert "3 steps in a row were not finite" in done.stderr
    assert "Traceback" not in done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records][-2:] == [True, True]
    kept = [iteration for iteration, _ in committed(run_dir / "checkpoints")]
    assert kept, "no checkpoint is left"
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 17


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("accept", "5 steps in a row were not finite ("),
        ("skip", "5 steps in a row were skipped, as not finite or as s"),
    ],
)
def test_it_says_what_was_skipped(action, says):
    config = RECIPES["tiny_dense"]().with_section("resilience", spike_action=action)
    components = SimpleNamespace(config=config, progress=SimpleNamespace(consecutive_skips=5))
    record = SimpleNamespace(iteration=9, result=SimpleNamespace(loss=3.0, grad_norm=9e9))
    with pytest.raises(NumericsError, match=re.escape(says)):
        NumericsGuard().after_step(SimpleNamespace(components=components), record)
