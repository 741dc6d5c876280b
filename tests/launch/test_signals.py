"""A run that is asked to stop saves at the end of its step and says with its exit code what to do next."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.paths import committed
from tests.conftest import command, environment, run

LONG = [
    "training.train_iters=100000",
    "training.eval_interval=0",
    "checkpoint.save_interval=0",
    "metrics.tensorboard=false",
]


def start(tokens: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> "subprocess.Popen[str]":
    """A run that would last hours, past its third step."""
    words = [f"data.path={tokens}", *LONG, *overrides, "--run-dir", run_dir, "--nproc", ranks]
    process = subprocess.Popen(
        command("launch.train", "tiny_dense", *words), env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while steps(run_dir) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGUSR2", 75), ("SIGINT", 130)])
def test_saves_and_leaves(number, code, tokens, tmp_path):
    run_dir = tmp_path / "run"
    process = start(tokens, run_dir)
    process.send_signal(getattr(signal, number))
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert number in text
    assert "Traceback" not in text
    done = steps(run_dir)
    assert [iteration for iteration, _ in committed(run_dir / "checkpoints")] == [done]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["iteration"]) == ("stopped", code, done)
    if number == "SIGTERM":
        end = done + 3
        words = [f"data.path={tokens}", *LONG, f"training.train_iters={end}", "--run-dir", run_dir, "--nproc", 2]
        again = run("launch.train", "tiny_dense", *words, check=True)
        assert f"at iteration {done}" in again.stderr
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["iteration"] for record in records] == list(range(1, end + 1))
        assert [record["attempt"] for record in records] == [1] * done + [2] * 3


def test_second_interrupt_leaves_at_once(tokens, tmp_path):
    run_dir = tmp_path / "run"
    # Steps of many seconds: a stop at the end of the step is far away.
    slow = ["training.global_batch_size=4000", "training.train_iters=100000"]
    words = [f"data.path={tokens}", *LONG, *slow, "--run-dir", run_dir, "--nproc", 1]
    process = subprocess.Popen(
        command("launch.train", "tiny_dense", *words), env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "one interrupt waits for the end of the step"
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - sent < 10
    assert committed(run_dir / "checkpoints") == []


def test_a_rank_that_dies_ends_the_run(tokens, tmp_path):
    run_dir = tmp_path / "run"
    process = start(tokens, run_dir)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(ranks) == 2
    subprocess.run(["kill", "-9", ranks[1]], check=True)
    process.communicate(timeout=90)
    assert process.returncode == 76
    for rank in ranks:
        assert not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().split()[2]
