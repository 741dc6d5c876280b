"""The cluster ``local``: the same commands on a machine without Slurm."""

import json
import os
import signal
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint.paths import committed
from tests.conftest import run
from tests.tiers import thorough

WORDS = [
    "training.train_iters=12",
    "checkpoint.save_interval=4",
    "metrics.tensorboard=false",
    "training.eval_interval=0",
]


def wait_for_state(run_dir: Path, *states: str, timeout_s: float = 240) -> str:
    """Waits until status.json says one of these."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            state = str(json.loads((run_dir / "status.json").read_text())["state"])
        except (OSError, ValueError):
            state = ""
        if state in states:
            return state
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in run_dir.glob("*/*.out"))
    raise AssertionError(f"the state is {state} and not {states} after {timeout_s} s\n{logs}")


def launch(*arguments: object, check: bool = True):
    return run("launch.command", *arguments, check=check)


def watched(tmp_path: Path) -> Path:
    """A cluster file of this machine, where somebody watches the runs."""
    path = tmp_path / "watched.yaml"
    (tmp_path / "collected").mkdir()
    content = {
        "scheduler": "local",
        "gpus_per_node": 0,
        "metrics_directory": str(tmp_path / "collected"),
        "alert_command": ["sh", "-c", f"cat >> {tmp_path}/told"],
        "alert_on": ["done"],
    }
    path.write_text(json.dumps(content))
    return path


def metrics(path: Path) -> dict[str, float]:
    """The last value of every metric, by the name of its sample and its last label."""
    families = text_string_to_metric_families(path.read_text())
    return {
        " ".join([sample.name, *[text for label, text in sample.labels.items() if label != "run"]]): sample.value
        for family in families
        for sample in family.samples
    }


def test_submit_status_logs(tokens, tokenizer, tmp_path):
    run_dir = tmp_path / "run"
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *WORDS]
    where = ["--cluster", watched(tmp_path), "--run-dir", run_dir]
    first = launch("submit", *words, *where, "--json")
    assert json.loads(first.stdout)[0]["run_dir"] == str(run_dir)
    refused = launch("submit", *words, *where, check=False)
    assert refused.returncode == 2
    assert "is already in progress" in refused.stderr
    wait_for_state(run_dir, "done")
    (row,) = json.loads(launch("status", tmp_path, "--json").stdout)
    assert (row["state"], row["iteration"], row["train_iters"], row["attempts"]) == ("done", 12, 12, 1)
    assert row["loss"] > 0
    table = launch("status", run_dir).stdout
    assert "12/12" in table
    shown = launch("logs", run_dir, "--rank", 0).stdout
    assert "==> attempt 1" in shown
    assert "step 12/12" in shown
    kept = (run_dir / "logs" / "attempt_001" / "rank_0.log").read_text()
    assert "performance: parallel.overlap_grad_reduce=false: no overlap of communication with compute on a CPU" in kept
    assert "attempt 1 on this machine" in launch("logs", run_dir, "--controller").stdout
    wait_for_no_job(run_dir)
    (collected,) = (tmp_path / "collected").glob("mq_run_*.prom")
    for path in (run_dir / "metrics.prom", collected):
        found = metrics(path)
        assert (found["mq_iteration"], found["mq_restarts_total"]) == (12, 0)
        assert (found["mq_run_state done"], found["mq_run_state running"]) == (1, 0)
        assert found["mq_loss"] == row["loss"]
        assert 0 < found["mq_goodput_ratio"] < 1
    told = json.loads((tmp_path / "told").read_text())
    assert (told["event"], told["state"], told["iteration"], told["run_dir"]) == ("done", "done", 12, str(run_dir))
    again = launch("submit", *words, *where)
    assert "is already done" in again.stdout
    other = launch("submit", *words, "optim.learning_rate=0.5", *where, check=False)
    assert other.returncode == 2
    assert "optim.learning_rate = 0.5" in other.stderr
    assert "Traceback" not in other.stderr
    more = launch("submit", *words, "training.train_iters=16", *where)
    assert "submitted" in more.stdout
    wait_for_state(run_dir, "queued", "running")
    wait_for_state(run_dir, "done")
    assert committed(run_dir / "checkpoints")[0][0] == 16


def test_a_killed_rank_and_a_cancelled_run(tokens, tokenizer, tmp_path):
    run_dir = tmp_path / "run"
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *WORDS, "training.train_iters=100000"]
    launch("submit", *words, "checkpoint.save_interval=1000", "--cluster", "local", "--run-dir", run_dir)
    attempts = AttemptLog(run_dir / "attempts.jsonl")
    os.kill(rank_of(run_dir), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while attempts.newest() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert attempts.read()[0].reason == "lost peer"
    rank_of(run_dir)
    assert "cancelled job" in launch("cancel", run_dir).stdout
    wait_for_state(run_dir, "cancelled")
    assert committed(run_dir / "checkpoints"), "it saved before it left"
    wait_for_no_job(run_dir)


def test_frozen_code_that_is_too_old_for_the_configuration(tokens, tokenizer, tmp_path):
    run_dir = tmp_path / "run"
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *WORDS]
    where = ["--cluster", "local", "--run-dir", run_dir]
    launch("freeze", *words, *where)
    sections = run_dir / "code/megatron_qwen/config/resilience.py"
    text = sections.read_text()
    assert "hang_timeout_s: float" in text
    sections.write_text(text.replace("hang_timeout_s: float", "older_name_s: float"))
    before = (run_dir / "run.yaml").read_text()
    refused = launch("submit", *words, "training.eval_iters=3", *where, check=False)
    assert refused.returncode == 2
    assert "resilience.hang_timeout_s" in refused.stderr
    assert "--new-code" in refused.stderr
    assert (run_dir / "run.yaml").read_text() == before
    launch("freeze", *words, *where, check=False)
    assert "older_name_s" in sections.read_text(), "nothing was replaced unasked"


@thorough("tests/job/test_controller.py has the limit")
def test_three_restarts_without_progress(tokens, tokenizer, tmp_path):
    """An error at another iteration each time, and never a checkpoint; then a person has it go on."""
    run_dir = tmp_path / "run"
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *WORDS]
    where = ["--cluster", "local", "--run-dir", run_dir]
    launch("freeze", *words, *where)
    trainer = run_dir / "code/megatron_qwen/training/trainer.py"
    text = trainer.read_text()
    mark = "        components, config, progress = self.components, self.components.config, self.components.progress\n"
    broken = "if progress.iteration > int(__import__('os').environ['MQ_ATTEMPT']) % 3: raise OSError(5, 'bad')"
    trainer.write_text(text.replace(mark, f"{mark}        {broken}\n"))
    launch("submit", *words, *where)
    wait_for_state(run_dir, "stopped")
    attempts = AttemptLog(run_dir / "attempts.jsonl").read()
    assert [attempt.action for attempt in attempts] == ["requeue", "requeue", "requeue", "stop"]
    said = launch("logs", run_dir, "--controller").stdout
    assert "3 restarts without a newer checkpoint" in said
    assert "No checkpoint was written" in said
    trainer.write_text(text)
    assert "submitted again" in launch("requeue", run_dir).stdout
    wait_for_state(run_dir, "done")


def wait_for_no_job(run_dir: Path, timeout_s: float = 60) -> None:
    """Waits until a cancel finds no job: the controller lives on for a moment after it has written the last state."""
    deadline = time.monotonic() + timeout_s
    while "has no pending or running job" not in (said := launch("cancel", run_dir).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def rank_of(run_dir: Path, timeout_s: float = 60) -> int:
    """Process of the run's only rank, once it has made a step."""
    deadline = time.monotonic() + timeout_s
    newest = AttemptLog(run_dir / "attempts.jsonl").newest
    while time.monotonic() < deadline:
        beat = run_dir / "heartbeat.json"
        content = json.loads(beat.read_text()) if beat.is_file() else {}
        if content.get("phase") == "training" and content["attempt"] == newest():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes().decode().split("\0")
                except OSError:
                    continue
                if "megatron_qwen.train" in line and str(run_dir) in line:
                    return int(path.parent.name)
        time.sleep(0.1)
    raise AssertionError("no rank")


def test_other_packages_than_at_the_submission(tokens, tokenizer, tmp_path):
    run_dir = tmp_path / "run"
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *WORDS]
    where = ["--cluster", "local", "--run-dir", run_dir]
    launch("freeze", *words, *where)
    path = run_dir / "environment.json"
    content = json.loads(path.read_text())
    present = content["packages"]["numpy"]["version"]
    content["packages"]["numpy"]["version"] = "1.0"
    path.write_text(json.dumps(content))
    refused = launch("submit", *words, *where, check=False)
    assert refused.returncode == 2
    assert f"numpy 1.0 -> {present}" in refused.stderr
    assert "--new-code" in refused.stderr
    assert not (run_dir / "jobs.jsonl").exists()
    launch("submit", *words, *where, "--new-code")
    assert json.loads(path.read_text())["packages"]["numpy"]["version"] == present
    wait_for_state(run_dir, "done")
    state = json.loads((committed(run_dir / "checkpoints")[0][1] / "state.json").read_text())
    assert state["environment"]["packages"]["numpy"] == present
    attempt = json.loads((run_dir / "logs/attempt_001/environment.json").read_text())
    assert attempt["facts"] == state["environment"]["facts"]
