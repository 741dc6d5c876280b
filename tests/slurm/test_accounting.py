"""With slurmdbd: what Slurm has forgotten is still known, and everything else is as without it."""

import json
import os

import pytest

from tests.slurm import accounting
from tests.slurm.cluster import missing_programs, running
from tests.slurm.runs import Runs


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


def test_a_run_that_slurm_killed_without_a_word(accounted):
    """Its job is no longer in the queue; sacct says how it ended."""
    short = ("training.train_iters=10", "checkpoint.save_interval=0")
    run = accounted.submit("done", *short, nodes=1)
    run.wait_for_end()
    ran = accounted.submit("gone", "training.train_iters=100000", nodes=1)
    ran.wait_for_step(2)
    accounted.cluster.ask("scancel", "--signal=KILL", "--full", ran.job)
    account = ["sacct", "-X", "-n", "-o", "State", "-j", ran.job]
    over = lambda: accounted.cluster.ask(*account).strip() not in ("", "RUNNING")  # noqa: E731
    ran.wait(over, "account of the end", timeout_s=60)
    (row,) = json.loads(accounted.mq("status", ran.path, "--json"))
    assert row["state"] == "lost"
    assert row["advice"] == f"mq launch requeue {ran.path}"
    (row,) = json.loads(accounted.mq("status", run.path, "--json"))
    assert row["state"] == "done"
    said = accounted.cluster.ask("sacct", "-X", "-n", "-P", "-o", "State", "-j", run.job).strip()
    assert said == "COMPLETED"
