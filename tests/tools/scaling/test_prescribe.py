"""From a fit to a run.yaml."""

import json
import re

import pytest
import yaml

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.tools.scaling.studies import Study
from tools.scaling.observations import write_csv


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fit of a study of Step Law and Chinchilla's law."""
    folder = tmp_path_factory.mktemp("fit")
    write_csv(folder / "study.csv", Study(noise=0.002).draw(0))
    run("launch.sweep", "fit", str(folder / "study.csv"), "--draws", "200", check=True)
    return folder / "study.fit.json"


def prescribed(fitted, *words):
    done = run("launch.sweep", "prescribe", str(fitted), "--recipe", "qwen2_5_7b", *words, "--json", check=True)
    return json.loads(done.stdout)


SIZED = ["--params", "7e9", "--tokens", "3e11", "--gpus", "64", "--gpu", "h100"]


def test_every_number_has_its_origin(fitted, tmp_path):
    answer = prescribed(fitted, *SIZED)
    path = tmp_path / "run.yaml"
    path.write_text(answer["run_yaml"])
    config = resolve(str(path), [], RECIPES)
    assert answer["params"] == pytest.approx(7e9, rel=0.05)
    n, d = answer["params"], 3e11
    assert config.optim.learning_rate == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=0.1)
    batch = config.training.global_batch_size * config.data.seq_length
    assert batch == pytest.approx(0.58 * d**0.571, rel=0.2)
    assert config.training.global_batch_size % 64 == 0
    assert config.training.train_iters * batch == pytest.approx(d, rel=1e-3)
    loss = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    low, high = answer["interval"]
    assert low < loss < high
    assert answer["loss"] == pytest.approx(loss, rel=0.02)
    for field in ("learning_rate", "global_batch_size", "train_iters", "micro_batch_size", "hidden_size"):
        assert re.search(rf"^  {field}: .*  # \w", answer["run_yaml"], re.MULTILINE), field


def test_launch_takes_it(fitted, tmp_path):
    (tmp_path / "run.yaml").write_text(prescribed(fitted, *SIZED)["run_yaml"])
    done = run("launch.command", "dry-run", str(tmp_path / "run.yaml"), "--nodes", "8")
    assert done.returncode == 0, done.stderr
    assert "data.path" in done.stdout + done.stderr  # the one thing that a fit does not know


def test_a_budget_is_spent_where_the_loss_is_least(fitted):
    """Neither a smaller nor a larger model on as many GPU-hours is predicted to be better."""
    wanted = ["--gpus", "32", "--gpu", "h200", "--refuse-factor", "1e5"]
    best = prescribed(fitted, "--gpu-hours", "2000", *wanted)
    assert best["hours"] * 32 == pytest.approx(2000, rel=0.1)
    for factor in (0.5, 2.0):
        sized = ["--params", str(best["params"] * factor), "--tokens", str(best["tokens"] / factor)]
        other = prescribed(fitted, *sized, *wanted)
        assert other["loss"] > best["loss"] * 0.9999


def test_beyond_what_was_fitted(fitted):
    """Silent near it, warned beyond ten times, refused beyond a thousand unless told otherwise."""
    command = ["launch.sweep", "prescribe", str(fitted), "--recipe", "qwen2_5_7b"]
    assert "warning" not in run(*command, *SIZED, check=True).stderr
    farther = ["--params", "7e9", "--tokens", "3e12", "--gpus", "64"]
    assert re.search(r"warning: extrapolates [\d.]+ times", run(*command, *farther, check=True).stderr)
    far = ["--params", "7e10", "--tokens", "1e14", "--gpus", "1024"]
    refused = run(*command, *far)
    assert refused.returncode == 2
    assert "times the compute" in refused.stderr
    assert run(*command, *far, "--refuse-factor", "1e7").returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--params", "7e9", "--gpus", "8"], "--params and --tokens"),
        (["--params", "-1", "--tokens", "nan", "--gpus", "8"], "above 0"),
        (["--gpu-hours", "10", "--params", "1e9", "--gpus", "8"], "alone"),
        (["--params", "1e11", "--tokens", "1e11", "--gpus", "1", "--refuse-factor", "1e9"], "no layout"),
        (["--params", "1e9", "--tokens", "1e10", "--gpus", "8", "model.hiden=3"], "no such field"),
    ],
)
def test_what_cannot_be(fitted, words, said):
    done = run("launch.sweep", "prescribe", str(fitted), "--recipe", "qwen2_5_7b", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_fit(tmp_path):
    (tmp_path / "fit.json").write_text(yaml.safe_dump({"format": 1}))
    done = run("launch.sweep", "prescribe", str(tmp_path / "fit.json"), "--recipe", "qwen2_5_7b", *SIZED)
    assert done.returncode == 3
    assert "is not a fit" in done.stderr
