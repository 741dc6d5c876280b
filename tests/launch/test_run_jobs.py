"""Runs without Slurm on a file system that several machines share."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest

from launch import command, control, run_jobs, status
from megatron_qwen import slurm
from megatron_qwen.config.render import to_yaml
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.recipes.registry import RECIPES
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
    assert list(control.cancel([elsewhere])) == ["run: runs on other; cancel it there"]


def test_of_this_machine_the_process_itself_tells(elsewhere):
    entry = json.loads(elsewhere.jobs.read_text()) | {"host": os.uname().nodename}
    elsewhere.jobs.write_text(json.dumps(entry) + "\n")
    assert run_jobs.submissions(elsewhere)[-1].elsewhere is None
    assert run_jobs.active(elsewhere, {}) == []  # this process is no job of that run


@pytest.fixture
def on_slurm(tmp_path):
    """A run whose job 7 has begun."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.run_yaml.write_text("training:\n  train_iters: 9\n")
    run.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    JobSettings(scheduler="slurm", signal_delay_s=10, python=sys.executable).write(run.path)
    run.write_status(RunState.RUNNING, job_id="7")
    run.heartbeat.write_text("{}")
    return run


def job(state: str) -> slurm.QueuedJob:
    return slurm.QueuedJob("7", state, "None", "1:00", "9:00", "n1", "now", "run", "100")


def silence(*_: object, **__: object) -> str:
    raise slurm.SlurmError(Problem("squeue", None, "did not answer within 60 s"))


def test_a_word_about_an_earlier_job_does_not_concern_a_newer_one(on_slurm):
    assert not on_slurm.is_cancelled("7")
    on_slurm.write_status(RunState.CANCELLED, jobs=["5", "6"])
    assert [on_slurm.is_cancelled(one) for one in ("5", "6", "7", None)] == [True, True, False, True]
    on_slurm.write_status(RunState.CANCELLED, job_id="7")
    assert on_slurm.is_cancelled("7")
    on_slurm.write_status(RunState.CANCELLED)
    assert on_slurm.is_cancelled("7"), "of earlier versions, which did not say of which job"
    on_slurm.status.write_text("[")
    assert not on_slurm.is_cancelled("7")


def test_a_cancelled_job_that_still_saves_is_waited_for(on_slurm, monkeypatch):
    queue = {"7": job("COMPLETING")}
    assert run_jobs.active(on_slurm, queue) == ["7"], "it may as well be requeued"
    on_slurm.write_status(RunState.CANCELLED, jobs=["7"])
    assert run_jobs.active(on_slurm, queue) == []
    assert run_jobs.ending(on_slurm, queue) == ["7"]
    asked = []
    monkeypatch.setattr(run_jobs, "known", lambda _: queue)
    monkeypatch.setattr(control, "_request_of", lambda *_: None)
    monkeypatch.setattr(control, "hand_over", lambda *_, forgive, after: asked.append((forgive, after)) or ["8"])
    said = list(control.requeue([on_slurm]))
    assert said == ["run: submitted again as job 8; it waits until job 7 has saved and ended"]
    assert asked == [(True, ["7"])]


def test_a_cancel_that_slurm_does_not_take_is_taken_back(on_slurm, monkeypatch):
    monkeypatch.setattr(run_jobs, "known", lambda _: {"7": job("RUNNING")})
    monkeypatch.setattr(slurm, "ask", silence)
    with pytest.raises(slurm.SlurmError):
        list(control.cancel([on_slurm]))
    assert on_slurm.state() is RunState.RUNNING


def test_a_run_on_a_full_disk_is_cancelled_all_the_same(on_slurm, monkeypatch):
    asked = []
    monkeypatch.setattr(run_jobs, "known", lambda _: {"7": job("PENDING")})
    monkeypatch.setattr(slurm, "ask", lambda *command: asked.append(command) or "")
    monkeypatch.setattr(RunDirectory, "write_status", lambda *_, **__: os.write(-1, b""))
    assert list(control.cancel([on_slurm])) == ["run: cancelled job 7"]
    assert asked == [("scancel", "7")]


def test_a_run_of_another_user_is_not_submitted_as_ones_own(on_slurm, monkeypatch):
    monkeypatch.setattr(run_jobs, "known", lambda _: {})
    monkeypatch.setattr(os, "getuid", lambda: on_slurm.path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"belongs to .*, and a new job would be yours"):
        list(control.requeue([on_slurm]))


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "COMPLETING"])
def test_a_start_by_hand_is_refused_while_a_job_is_there(state, on_slurm, monkeypatch):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(run_jobs, "known", lambda _: {"7": job(state)})
    with pytest.raises(ConfigError, match="is in use by job 7"):
        run_jobs.require_none(on_slurm)
    monkeypatch.setattr(run_jobs, "known", lambda _: {"7": job("COMPLETED")})
    run_jobs.require_none(on_slurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run_jobs, "known", silence)
    run_jobs.require_none(on_slurm)  # this is the job


def test_a_start_by_hand_is_refused_where_a_job_may_be_there(on_slurm, monkeypatch):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(run_jobs, "known", silence)
    with pytest.raises(ConfigError, match="whether it still runs cannot be asked: squeue: did not answer"):
        run_jobs.require_none(on_slurm)
    monkeypatch.setattr(slurm, "is_there", lambda: False)
    with pytest.raises(ConfigError, match="of a cluster that this machine cannot ask"):
        run_jobs.require_none(on_slurm)
    silent(on_slurm, 3600)
    run_jobs.require_none(on_slurm)


def test_a_status_without_an_answer_of_slurm_says_so(on_slurm, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", silence)
    assert command.main(["status", str(on_slurm.path)]) == 1
    told = capsys.readouterr()
    assert "running" in told.out
    assert "Slurm was not asked, so this is what the runs noted last: squeue: did not answer" in told.err
    on_slurm.write_status(RunState.DONE)
    assert command.main(["status", str(on_slurm.path), "--check"]) == 0, "nothing is open"


def test_jobs_that_a_cluster_hides_are_not_lost(on_slurm, monkeypatch):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", lambda _: {})
    monkeypatch.setattr(slurm, "accounting", lambda _: {})
    (row,) = status.collect([on_slurm]).rows
    assert (row.state, "requeue" in row.advice) == ("lost", True)
    monkeypatch.setattr(os, "getuid", lambda: on_slurm.path.stat().st_uid + 1)
    for hidden, wanted in ((True, "running"), (False, "lost")):
        asked = []
        monkeypatch.setattr(slurm, "hides_jobs", lambda hidden=hidden, asked=asked: asked.append(1) or hidden)
        row, other = status.collect([on_slurm, on_slurm]).rows
        assert (row.state, other.state) == (wanted, wanted)
        assert len(asked) == 1, "once for all runs"
        assert ("does not show" in row.reason) is hidden
        assert bool(row.advice) is not hidden


@pytest.mark.parametrize(("state", "code"), [("RUNNING", 0), ("PENDING", 0), ("SUSPENDED", 1), ("FAILED", 1)])
def test_what_monitoring_asks(state, code, on_slurm, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", lambda _: {"7": job(state)})
    assert command.main(["status", str(on_slurm.path), "--check"]) == code
    assert bool(capsys.readouterr().out) is bool(code)


def test_a_run_is_submitted_again_with_its_spare_nodes(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]()))
    entry = {"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 2}
    for more in ({}, {"spares": 1}):
        run.jobs.write_text(json.dumps(entry | more) + "\n")
        (newest,) = run_jobs.submissions(run)
        request = control._request_of(run, newest)
        assert (request.world_size, request.job_nodes) == (2 * request.ranks_per_node, 2 + more.get("spares", 0))


def test_a_run_keeps_its_quarantine_wherever_it_is_requeued(tmp_path, monkeypatch):
    """The run root of the cluster file is relative: it was another directory where the run was submitted."""
    run = RunDirectory(tmp_path / "root" / "run")
    run.path.mkdir(parents=True)
    run.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]()))
    run.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 2}) + "\n")
    monkeypatch.chdir(tmp_path)
    (newest,) = run_jobs.submissions(run)
    assert control._request_of(run, newest).cluster.quarantine == tmp_path / "root" / ".quarantine"
    settings = JobSettings(scheduler="slurm", signal_delay_s=10, quarantine="/shared/runs/.quarantine")
    settings.write(run.path)
    assert str(control._request_of(run, newest).cluster.quarantine) == settings.quarantine
    cluster = tmp_path / "ours.yaml"
    cluster.write_text(json.dumps({"gpus_per_node": 8, "run_root": "/elsewhere"}))
    named = replace(newest, cluster=str(cluster))
    assert str(control._request_of(run, named).cluster.quarantine) == "/elsewhere/.quarantine"


def test_each_run_is_told_when_it_is_done(on_slurm, monkeypatch):
    monkeypatch.setattr(run_jobs, "known", lambda _: {"7": job("RUNNING")})
    asked = []
    monkeypatch.setattr(slurm, "ask", lambda *command: asked.append(command) or (silence() if asked[1:] else ""))
    told = control.requeue([on_slurm, on_slurm])
    assert next(told) == "run: requeued job 7; it saves first"
    assert asked == [("scontrol", "requeue", "7")]
    with pytest.raises(slurm.SlurmError):
        next(told)
