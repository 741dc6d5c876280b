"""Runs without Slurm on a file system that several machines share."""

import json
import os
import time

import pytest

from launch import control, run_jobs
from megatron_qwen.rundir import RunDirectory, RunState


@pytest.fixture
def elsewhere(tmp_path):
    """A run that was started on another machine; the number of its process is this process's here."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    entry = {"jobs": [str(os.getpid())], "scheduler": "local", "cluster": "local", "nodes": 1, "host": "other"}
    run.jobs.write_text(json.dumps(entry) + "\n")
    run.write_status(RunState.RUNNING)
    run.heartbeat.write_text("{}")
    return run


def silent(run, seconds):
    for path in (run.jobs, run.heartbeat):
        os.utime(path, (time.time() - seconds,) * 2)


def test_it_is_alive_as_long_as_it_shows_signs_of_life(elsewhere):
    assert run_jobs.active(elsewhere, {}) == [str(os.getpid())]
    silent(elsewhere, 3600)
    assert run_jobs.active(elsewhere, {}) == []
    elsewhere.heartbeat.touch()
    assert run_jobs.active(elsewhere, {}) == [str(os.getpid())]
    elsewhere.write_status(RunState.DONE)
    assert run_jobs.active(elsewhere, {}) == []


def test_it_is_not_cancelled_from_here(elsewhere, monkeypatch):
    monkeypatch.setattr(run_jobs, "tell_local", lambda *_: pytest.fail("another process got the signal"))
    assert control.cancel([elsewhere]) == ["run: runs on other; cancel it there"]


def test_of_this_machine_the_process_itself_tells(elsewhere):
    entry = json.loads(elsewhere.jobs.read_text()) | {"host": os.uname().nodename}
    elsewhere.jobs.write_text(json.dumps(entry) + "\n")
    assert run_jobs.submissions(elsewhere)[-1].elsewhere is None
    assert run_jobs.active(elsewhere, {}) == []  # this process is no job of that run
