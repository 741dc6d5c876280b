"""A submission that was killed, told from one that is under way. tests/slurm/test_orphans.py kills real ones."""

import datetime
import json
import os
import signal
import subprocess

import pytest

from launch import orphans, run_jobs, status
from megatron_qwen import slurm
from megatron_qwen.errors import Problem
from megatron_qwen.rundir import RunDirectory, RunState
from tests.conftest import command, environment

ENTRY = {"time": "2026-01-01T00:00:00+00:00", "scheduler": "slurm", "cluster": "cpu", "nodes": 1}


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.submission.mkdir(parents=True)
    directory.run_yaml.write_text("training:\n  train_iters: 9\n")
    directory.write_status(RunState.QUEUED)
    return directory


def announced(run, *, index=None, **facts):
    entry = {**ENTRY, "host": os.uname().nodename, **facts}
    orphans.announce(run, entry, name="run", folder=run.submission, index=index)
    content = json.loads(run.submitting.read_text())
    run.submitting.write_text(json.dumps({**content, "pid": 2**22 + 1, **facts}))


@pytest.fixture
def jobs_of_slurm(run, monkeypatch):
    """Jobs by id, each with the directory of its output; ``named`` answers with all of them."""
    jobs = {}
    queued = slurm.QueuedJob("", "PENDING", "Resources", "0:00", "9:00", "", "N/A", "run", "100")
    monkeypatch.setattr(slurm, "named", lambda name, *, user: dict.fromkeys(jobs, queued))
    monkeypatch.setattr(slurm, "show_job", lambda job: {"Command": f"{jobs[job]}/.submission_file_{job}.sh"})
    return jobs


def test_its_jobs_are_noted_once(run, jobs_of_slurm):
    announced(run, chain=2)
    jobs_of_slurm |= {
        "10": run.submission,
        "9": run.submission,
        "11": "/elsewhere/run/submission",
        "12_0": run.submission,
    }
    assert orphans.is_cut_off(run)
    assert orphans.settle(run) == ["9", "10"]
    assert not run.submitting.exists()
    (noted,) = run_jobs.submissions(run)
    assert (noted.jobs, noted.scheduler, noted.cluster, noted.chain) == (("9", "10"), "slurm", "cpu", 2)
    announced(run)
    assert orphans.settle(run) == [], "they are known"


def test_a_task_of_an_array(run, jobs_of_slurm):
    announced(run, index=1)
    jobs_of_slurm |= dict.fromkeys(["12_0", "12_1", "12_10"], run.submission)
    assert orphans.settle(run) == ["12_1"]


def test_one_that_is_under_way_is_left_alone(run, jobs_of_slurm):
    jobs_of_slurm["9"] = run.submission
    announced(run, pid=os.getppid(), begun=orphans._begun(os.getppid()))
    assert orphans.is_being_submitted(run)
    assert orphans.settle(run) == []
    assert run.submitting.exists()
    now = datetime.datetime.now(datetime.UTC)
    announced(run, host="other", time=now.isoformat())
    assert orphans.is_being_submitted(run)
    announced(run, host="other", time=(now - datetime.timedelta(hours=1)).isoformat())
    assert orphans.is_cut_off(run)
    announced(run, pid=os.getppid(), begun=1.0)
    assert orphans.is_cut_off(run), "another process has its number"


def test_without_an_answer_of_slurm_it_is_asked_again(run, monkeypatch):
    def silence(*_, **__):
        raise slurm.SlurmError(Problem("squeue", None, "did not answer within 60 s"))

    monkeypatch.setattr(slurm, "named", silence)
    announced(run)
    with pytest.raises(slurm.SlurmError):
        orphans.settle(run)
    orphans.settle_where_possible(run)
    assert run.submitting.exists()


def test_what_status_says(run, jobs_of_slurm, monkeypatch):
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(slurm, "jobs", lambda ids: {})
    announced(run)
    look = status.collect([run])
    (row,) = look.needs_a_hand
    assert (row.state, row.reason) == ("lost", "its submission was cut off, and Slurm has no job of it")
    assert run.submitting.exists(), "Slurm may still get it"
    monkeypatch.setattr(os, "getuid", lambda: run.path.stat().st_uid + 1)
    (row,) = status.collect([run]).rows
    assert row.state == "queued"
    assert "its submission was cut off" in row.reason


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"name": "x"}'])
def test_a_file_that_says_nothing(run, torn):
    run.submitting.write_text(torn)
    assert orphans.settle(run) == []
    assert not orphans.is_cut_off(run)


_SBATCH = """#!/bin/bash
script=${@: -1}
echo "$script" > "$here/script"
echo "Submitted batch job 31"
[ ! -e "$here/kill" ] || kill -9 $PPID
"""
_SQUEUE = """#!/bin/bash
[ -e "$here/script" ] || exit 0
case "$*" in *--name=fake*|*-j*31*) echo "31|PENDING|Resources|0:00|9:00||N/A|fake|1||" ;; esac
"""
_SCONTROL = """#!/bin/bash
case "$*" in
    *job*) echo "JobId=31 JobName=fake Command=$(cat "$here/script") Restarts=0" ;;
    *node*) echo "NodeName=n1 CPUTot=8 RealMemory=16000 State=IDLE Partitions=train" ;;
    *partition*) echo "PartitionName=train Default=YES Nodes=n1 TotalNodes=1 State=UP MaxTime=UNLIMITED" ;;
esac
"""


@pytest.fixture
def fake_slurm(tmp_path):
    """Programs that know one job, of which sbatch kills whoever calls it; answers with the environment of a shell."""
    folder = tmp_path / "programs"
    folder.mkdir()
    programs = {"sbatch": _SBATCH, "squeue": _SQUEUE, "scontrol": _SCONTROL}
    for name, text in programs.items():
        (folder / name).write_text(text.replace("$here", str(folder)))
        (folder / name).chmod(0o755)
    (folder / "kill").touch()
    (tmp_path / "slurm.conf").touch()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**environment(), "PATH": path, "SLURM_CONF": str(tmp_path / "slurm.conf")}


def test_a_real_submission_that_is_killed_when_slurm_has_its_job(fake_slurm, tokens, tokenizer, tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        json.dumps({"scheduler": "slurm", "gpus_per_node": 0, "ranks_per_node": 1, "run_root": str(tmp_path)})
    )
    where = ["--cluster", cluster, "--name", "fake"]
    words = ["tiny_dense", f"data.path={tokens}", f"data.tokenizer={tokenizer}", *where]

    def launch(*arguments):
        words = command("launch.command", *arguments)
        return subprocess.run(words, env=fake_slurm, capture_output=True, text=True, timeout=120)

    killed = launch("submit", *words)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    run = RunDirectory(tmp_path / "fake")
    assert run.submitting.is_file()
    assert not run.jobs.is_file()
    (row,) = json.loads(launch("status", run.path, "--json").stdout)
    assert (row["state"], row["jobs"]) == ("queued", ["31"])
    assert not run.submitting.exists()
    assert json.loads(run.jobs.read_text())["jobs"] == ["31"]
    assert "is already in progress as job 31" in launch("submit", *words).stderr
    assert launch("cancel", run.path).returncode in (0, 1)
    assert len(run.jobs.read_text().splitlines()) == 1
