"""A run that waits because of its file system is reported; one that waits for nodes is not."""

import os
from types import SimpleNamespace

import pytest

from launch import run_jobs, status
from launch.storage_wait import storage_fault
from megatron_qwen import slurm
from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.rundir import RunDirectory, RunState


def job(comment=""):
    return slurm.QueuedJob("7", "PENDING", "BeginTime", "0:00", "9:00", "", "N/A", "run", "100", "", comment)


def kept(reason):
    facts = {"reason": reason, "detail": "No space left on device in /runs/a"}
    return EndOfAttempt(1, facts, "why", 1, ()).as_text()


def test_what_the_run_or_its_job_has_noted(tmp_path):
    assert storage_fault(tmp_path, "storage: No space left", job()) == "No space left"
    assert storage_fault(tmp_path, "lost peer: rank 1", job(kept("storage"))) == "No space left on device in /runs/a"
    assert storage_fault(tmp_path, "lost peer: rank 1", job(kept("lost peer"))) == ""
    assert storage_fault(tmp_path, "", job("storage: a person's words")) == ""


def test_what_the_file_system_says(tmp_path, monkeypatch):
    state = {"f_flag": 0, "f_bavail": 10, "f_frsize": 4096}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state))
    assert storage_fault(tmp_path, "", job()) == f"no room is left in {tmp_path}"
    state |= {"f_bavail": 10**9}
    assert storage_fault(tmp_path, "", job()) == ""
    state |= {"f_flag": os.ST_RDONLY}
    assert "read-only" in storage_fault(tmp_path, "", job())


@pytest.mark.parametrize(("reason", "reported"), [("storage: No space left", True), ("preempted: by another", False)])
def test_monitoring_hears_of_it(tmp_path, monkeypatch, reason, reported):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.run_yaml.write_text("training:\n  train_iters: 9\n")
    run.jobs.write_text('{"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}\n')
    run.write_status(RunState.REQUEUED, reason=reason)
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", lambda _: {"7": job()})
    look = status.collect([run])
    assert [row.state for row in look.rows] == ["requeued"]
    assert bool(look.needs_a_hand) is reported
    assert run_jobs.active(run, {"7": job()}) == ["7"]


def test_a_directory_that_may_not_be_read(tmp_path, monkeypatch):
    """A run of another user; as root, every directory may be read."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "run.yaml").write_text("")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).startswith(str(place)))
    with pytest.raises(ValueError, match=r"may not be read by you; .* can open it to a group: chmod g\+rX"):
        status.find_runs([place])
