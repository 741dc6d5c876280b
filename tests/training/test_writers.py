"""Writers of a run: lines that a resumed run writes again, and a writer whose package is missing."""

import importlib.util
import shutil

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.training.attempts import attempt


def test_steps_that_are_done_again_are_kept_apart(finished_run, pool, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    config = resolve(str(tmp_path / "run" / "run.yaml"), ["training.train_iters=2"], RECIPES)
    assert len(attempt(pool, 1, config, tmp_path / "run")) == 2
    assert (tmp_path / "run" / "metrics.superseded.jsonl").read_text() == before


def test_wandb_that_is_not_installed_is_one_message(tokens, tmp_path):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    words = [f"data.path={tokens}", "metrics.wandb_project=p", "--run-dir", tmp_path / "run"]
    done = run("launch.train", "tiny_dense", *words)
    assert done.returncode == 2, done.stderr
    assert "metrics.wandb_project = p: needs the wandb package" in done.stderr
    assert "Traceback" not in done.stderr
