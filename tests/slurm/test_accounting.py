"""With slurmdbd: what Slurm has forgotten is still known, and everything else is as without it."""

import json
import os
import signal

import psutil
import pytest

from megatron_qwen.slurm import accounting as accounting_of
from tests.slurm import accounting
from tests.slurm.cluster import missing_programs, running
from tests.slurm.runs import Runs, kill


@pytest.fixture(scope="module")
def accounted(tokens, tokenizer, tmp_path_factory):
    if missing := missing_programs() + accounting.missing_programs():
        reason = f"not installed ({', '.join(missing)}): apt-get install slurm-wlm munge slurmdbd mariadb-server"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("accounted"), accounting=True) as cluster:
        cluster.ask("sacctmgr", "-i", "add", "cluster", "mq", check=False)
        yield Runs(cluster, tokens, tokenizer, tmp_path_factory.mktemp("accounted_runs"))


def test_a_run_whose_batch_script_is_killed(accounted, monkeypatch):
    """With the script that would requeue it; sacct says how the job ended."""
    short = ("training.train_iters=10", "checkpoint.save_interval=0")
    run = accounted.submit("done", *short, nodes=1)
    run.wait_for_end()
    ran = accounted.submit("gone", "training.train_iters=100000", nodes=1)
    ran.wait_for_step(2)
    controller = ran.controller_process()
    kill(psutil.Process(controller).ppid(), signal.SIGKILL)
    kill(controller, signal.SIGKILL)
    ran.wait(lambda: shown(accounted, ran)["state"] == "lost", "word that it is lost", timeout_s=60)
    row = shown(accounted, ran)
    assert "Slurm reports FAILED" in row["reason"]
    assert row["advice"] == f"mq launch requeue {ran.path}"
    assert shown(accounted, run)["state"] == "done"
    # What squeue has forgotten sacct still knows.
    for name, value in accounted.cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert accounting_of([ran.job, run.job]) == {ran.job: "FAILED", run.job: "COMPLETED"}


def shown(runs, run):
    """The run's row of the table."""
    (row,) = json.loads(runs.mq("status", run.path, "--json"))
    return row
