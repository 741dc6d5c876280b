"""A step that is taken again has the loss and gradient norm that the run recorded, and the run is left as it was."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_qwen.training.replay import ReplayedStep, describe, recorded_steps
from tests.conftest import run
from tests.training.attempts import attempt, configure


@pytest.fixture(scope="module")
def whole(pool, tokens, tmp_path_factory) -> Path:
    """Six steps with dropout on two ranks, with a checkpoint after the fourth."""
    run_dir = tmp_path_factory.mktemp("replay") / "run"
    length = ["training.train_iters=6", "checkpoint.save_interval=4", "training.eval_iters=0"]
    small = ["training.global_batch_size=2", "model.hidden_dropout=0.1", "performance.threads_per_rank=1"]
    attempt(pool, 2, configure("tiny_dense", tokens, *length, *small), run_dir)
    return run_dir


def digests(run_dir: Path) -> dict[str, str]:
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_step_is_repeated_to_the_last_digit_and_nothing_is_written(whole):
    before = digests(whole)
    done = run("launch.train", "--replay", 6, "--json", "--run-dir", whole)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # From the checkpoint of step 4, not from that of step 6, which holds the step.
    assert [step["iteration"] for step in report["steps"]] == [5, 6]
    assert report["equal"] is True
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in report["steps"]] == [line["lm_loss"] for line in lines[4:]]
    assert report["weight_hashes"]["0"] == report["weight_hashes"]["1"], "replicas"
    assert digests(whole) == before


def test_a_step_that_differs_ends_with_1(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[1])
    changed["grad_norm"] *= 1 + 1e-12
    lines[1] = json.dumps(changed)
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    done = run("launch.train", "--replay", 3, "--run-dir", run_dir)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert [line.split("  ")[3].split(" (")[0] for line in said[:3]] == ["equal", "DIFFERENT", "equal"]
    assert "weights of rank 1: " in said[4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replay", "7"], "--replay = 7: must be from 1 to training.train_iters=6"),
        (["--replay", "0"], "must be from 1"),
        (["--replay", "3", "tiny_dense"], "cannot be combined with --replay"),
        (["--replay", "3", "training.seed=3"], "cannot be combined with --replay"),
        (["--json", "tiny_dense"], "--json requires --replay"),
        ([], "a recipe or a run.yaml is required"),
    ],
)
def test_wrong_words_are_refused(words, message, whole):
    done = run("launch.train", *words, "--run-dir", whole)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_without_a_run_is_refused(tmp_path):
    done = run("launch.train", "--replay", 1, "--run-dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds no run" in done.stderr


def test_steps_without_a_record_are_said_to_have_none(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    record = '{"iteration": %d, "lm_loss": %s, "grad_norm": 2.0, "skipped": %s}\n'
    metrics.write_text(record % (1, "1.5", "false") + record % (2, "null", "true") + '{"iteration": 3, "lm')
    assert recorded_steps(metrics) == {1: (1.5, 2.0, False), 2: (None, 2.0, True)}
    assert recorded_steps(tmp_path / "none") == {}
    steps = [ReplayedStep(1, 1.5, 2.0, 1.5, 2.0), ReplayedStep(2, 1.0, 2.0, None, 2.0)]
    assert [step.equal for step in steps] == [True, None]
    assert "step 2  loss 1.0  grad 2.0  not recorded" in describe(steps, ["00ff"], as_json=False)
