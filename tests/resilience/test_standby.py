"""A rank that waits: it begins when it is told to, and ends when its job does."""

import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron_qwen.resilience import standby
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.resilience.standby import BEGIN, has_begun, is_ready, lay_out
from tests.conftest import command, environment


@pytest.fixture
def start(tmp_path):
    """Starts a rank that waits, and waits until it is ready."""
    begun = []

    def one(*prefix: str) -> "subprocess.Popen[bytes]":
        run_dir, folder = tmp_path / "run", tmp_path / "standby"
        (run_dir / "logs/attempt_002").mkdir(parents=True)
        lay_out(folder)
        words = [*prefix, *command("megatron_qwen.train", run_dir, "--standby", folder)]
        env = {**environment(), "MQ_ATTEMPT": "2", "SLURM_PROCID": "0"}
        begun.append(subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 120
        while not is_ready(folder):
            assert begun[0].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return begun[0]

    yield one
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_it_ends_when_the_job_is_told_to_stop(start, number, tmp_path):
    process = start()
    process.send_signal(number)
    assert process.wait(30) == 0
    assert not has_begun(tmp_path / "standby")


def test_it_ends_with_what_started_it(start, tmp_path):
    shell = start("sh", "-c", '"$@" & echo $! > "$0"; wait', str(tmp_path / "number"))
    rank = int((tmp_path / "number").read_text())
    shell.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_it_ends_when_nobody_wants_it(tmp_path, monkeypatch):
    """On a node that has lost its slurmd no signal arrives."""
    monkeypatch.setattr(standby, "_FOLDER_LOOK_S", 0.0)
    monkeypatch.setattr(standby, "_LOOK_S", 0.01)
    monkeypatch.setenv("SLURM_PROCID", "1")
    folder = tmp_path / "standby"
    lay_out(folder)

    def remove_soon() -> bool:
        threading.Timer(0.2, shutil.rmtree, [folder]).start()
        return False

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(SystemExit) as ended:
            standby.wait_for_turn(folder, tmp_path, StopSignals(), remove_soon)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert ended.value.code == 0


def test_its_output_goes_to_the_logs_of_its_attempt(start, tmp_path):
    """There is no run.yaml here, so the rank ends with that as its error."""
    process = start()
    process.send_signal(BEGIN)
    assert process.wait(60) == 2
    assert has_begun(tmp_path / "standby")  # no controller here, which would remove it
    assert "run.yaml" in (tmp_path / "run/logs/attempt_002/rank_0.log").read_text()
