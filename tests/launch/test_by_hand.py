"""A run that somebody trains by hand is not taken from them."""

import json
import os
import subprocess
import sys
import time

import pytest

from launch import status
from launch.by_hand import require_nobody
from megatron_qwen import slurm
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.errors import ConfigError
from megatron_qwen.rundir import RunDirectory, RunState


@pytest.fixture
def process():
    """One that lives."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child.pid
        child.kill()


@pytest.fixture
def directory(tmp_path, process):
    """A run whose attempt that process makes."""
    directory = RunDirectory(tmp_path)
    AttemptLog(directory.attempts).begin(world_size=1)
    change(directory, pid=process)
    return directory


def change(directory, **facts):
    entry = json.loads(directory.attempts.read_text().splitlines()[0])
    directory.attempts.write_text(json.dumps({**entry, **facts}) + "\n")


def test_on_this_machine(directory, process):
    with pytest.raises(ConfigError, match=f"is being trained by hand, as process {process} here"):
        require_nobody(directory)
    AttemptLog(directory.attempts).end(1, exit_code=75)
    require_nobody(directory)
    AttemptLog(directory.attempts).begin(world_size=1)
    require_nobody(directory)  # the attempt of this process


@pytest.mark.parametrize(
    "facts",
    [{"job_id": "7"}, {"nodes": ["n1"]}, {"pid": 2**22 + 1}, {"started": "2020-01-01T00:00:00+00:00"}, {"pid": None}],
)
def test_nobody_does(directory, facts):
    """A job does, or a job on this machine; the process is gone; another has its number; an attempt without one."""
    change(directory, **facts)
    require_nobody(directory)


def test_on_another_machine_signs_of_life_tell(directory):
    change(directory, host="other", pid=os.getpid())
    require_nobody(directory)
    directory.heartbeat.write_text("{}")
    with pytest.raises(ConfigError, match="on other, which showed a sign of life 0 s ago"):
        require_nobody(directory)
    require_nobody(directory, elsewhere=False)
    os.utime(directory.heartbeat, (time.time() - 200,) * 2)
    require_nobody(directory)


def test_without_attempts(tmp_path):
    require_nobody(RunDirectory(tmp_path))


def test_it_is_not_lost_after_an_earlier_job(directory, process, monkeypatch):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", lambda _: {})
    monkeypatch.setattr(slurm, "accounting", lambda _: {"7": "FAILED"})
    directory.run_yaml.write_text("training:\n  train_iters: 9\n")
    directory.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    directory.write_status(RunState.RUNNING, attempt=1)
    look = status.collect([directory])
    (row,) = look.rows
    assert (row.state, row.reason, row.advice) == ("running", f"by hand: process {process} here", "")
    assert look.needs_a_hand == []
    change(directory, pid=2**22 + 1)
    (row,) = status.collect([directory]).rows
    assert (row.state, row.reason) == ("lost", "Slurm reports FAILED, and no end was recorded")
