"""What a person does to a run while Slurm is at it: nothing that was computed is lost, nothing healthy is ended."""

import json
import subprocess

import pytest

from megatron_qwen import slurm
from megatron_qwen.checkpoint.paths import committed
from tests.conftest import command, environment
from tests.slurm.runs import TP2, lost_iterations

# The step in which the signal comes takes so long that the job is still ending when the next command is given.
SLOW = "time.sleep(7 if iteration == 15 and attempt == '1' else 0.12)"


@pytest.fixture
def ask_here(cluster, monkeypatch):
    """This process asks the cluster of the tests."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def test_submitted_again_while_the_cancelled_job_still_saves(runs, ask_here):
    run = runs.submit("again", *TP2, patch=SLOW)
    run.wait_for_step(14)
    assert "cancelled job" in runs.mq("cancel", run.path)
    told = runs.mq("requeue", run.path)
    assert f"it waits until job {run.job} has saved and ended" in told
    assert slurm.jobs([run.job])[run.job].state == "COMPLETING"
    assert runs.mq("status", run.path, "--check") == "", "a run that waits needs no hand"
    run.wait_for_end()
    first, second = run.attempts()
    assert first.reason == "cancelled"
    assert first.iteration == first.saved >= 15
    assert second.job_id != first.job_id
    assert committed(run.path / "checkpoints")[0][0] == 50
    assert lost_iterations(run.path) == 0
    assert run.hashes() == runs.undisturbed(2, *TP2)


def test_a_start_by_hand_does_not_take_the_run_from_its_job(runs):
    run = runs.submit("taken", *TP2)
    run.wait_for_step(2)
    words = [*runs.words(*TP2), "--run-dir", run.path, "--nproc", 2]
    env = {**environment(), **runs.cluster.environment}
    done = subprocess.run(command("launch.train", *words), env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"is in use by job {run.job}" in done.stderr
    assert f"mq launch cancel {run.path}" in done.stderr
    run.wait_for_end()
    assert [attempt.reason for attempt in run.attempts()] == ["finished"]
    assert run.hashes() == runs.undisturbed(2, *TP2)


def test_jobs_of_other_users_are_known(cluster, ask_here):
    script = ("--chdir=/", "--output=/dev/null", "--wrap=sleep 60")
    job = cluster.ask("sbatch", "--parsable", "--uid=nobody", *script).strip()
    assert job not in slurm.queue()
    assert slurm.jobs([job, "999999"])[job].state in ("PENDING", "RUNNING")
    assert slurm.jobs(["999999"]) == {}
    assert slurm.jobs([]) == {}
    assert slurm.hides_jobs() is False


def test_a_suspended_job_is_not_called_running(runs):
    run = runs.submit("asleep", *TP2)
    run.wait_for_step(3)
    runs.cluster.ask("scontrol", "suspend", run.job)
    code, _, told = runs.mq("status", run.path, "--check", check=False).partition("\n")
    assert code == "1"
    assert f"scontrol resume {run.job}" in told
    (row,) = json.loads(runs.mq("status", run.path, "--json"))
    assert row["state"] == "suspended"
    assert row["silent_s"] is not None
    runs.cluster.ask("scontrol", "resume", run.job)
    run.wait_for_end()
    assert run.hashes() == runs.undisturbed(2, *TP2)
