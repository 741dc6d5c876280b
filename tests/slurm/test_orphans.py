"""A submission that is killed leaves no job that nobody knows, and no second one beside it."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.conftest import command, environment
from tests.slurm.runs import TP2, ClusterRun, lost_iterations
from tests.tiers import cases, thorough

# After Slurm has taken the job, and before its answer is noted.
AFTER = '"$real" "$@"; kill -9 $PPID'
# The program outlives the submission, and Slurm takes the job when somebody has submitted the run again.
LATE = 'kill -9 $PPID; while [ ! -e "$here/go" ]; do sleep 0.1; done; exec "$real" "$@"'


def submit_and_die(runs, tmp_path, name, how, *overrides, pause_s=0.0):
    """Submits with an sbatch that kills its submission, and does this too."""
    programs = tmp_path / "programs"
    programs.mkdir()
    real = runs.cluster.ask("which", "sbatch").strip()
    program = programs / "sbatch"
    program.write_text(f"#!/bin/bash\nreal={real}\nhere={programs}\n{how}\n")
    program.chmod(0o755)
    env = {**environment(), **runs.cluster.environment}
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    where = ("--cluster", runs.cluster_file(), "--nodes", 2, "--name", name)
    words = [*runs.words(*TP2, *overrides), *where]
    if pause_s:
        runs.freeze_with(name, f"time.sleep({pause_s})", *words)
    done = subprocess.run(
        command("launch.command", "submit", *words), env=env, stdout=subprocess.DEVNULL, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    run = ClusterRun(runs.cluster, runs.root / name, [])
    assert (run.path / "submitting.json").is_file()
    assert not (run.path / "jobs.jsonl").is_file()
    return run, programs, words


def noted(run) -> list[list[str]]:
    path = run.path / "jobs.jsonl"
    return [json.loads(line)["jobs"] for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("first", cases(["status"], ["submit"]))
def test_a_submission_killed_when_slurm_has_the_job(runs, tmp_path, first):
    run, _, words = submit_and_die(runs, tmp_path, f"killed_{first}", AFTER, "training.train_iters=12")
    (job,) = runs.cluster.ask("squeue", "-h", "-o", "%A").split()
    if first == "status":
        (row,) = json.loads(runs.mq("status", run.path, "--json"))
        assert row["jobs"] == [job]
    assert f"is already in progress as job {job}" in runs.mq("submit", *words, check=False)
    assert noted(run) == [[job]]
    assert not (run.path / "submitting.json").exists()
    run.wait_for_end()
    assert [one.job_id for one in run.attempts()] == [job]


# The run must last longer than the late job needs to look around.
@pytest.mark.parametrize("pause_s", cases([], [0.8]))
def test_a_job_that_slurm_takes_when_the_run_has_another(runs, tmp_path, pause_s):
    run, programs, words = submit_and_die(runs, tmp_path, "late", LATE, pause_s=pause_s)
    (row,) = json.loads(runs.mq("status", run.path, "--json"))
    assert (row["state"], row["advice"]) == ("lost", "give the submit command again")
    (job,) = json.loads(runs.mq("submit", *words, "--json"))[0]["jobs"]
    run.wait_for_step(2)
    (programs / "go").touch()
    deadline = time.monotonic() + 60
    while len(jobs := set(runs.cluster.ask("squeue", "-h", "-t", "all", "-n", "late", "-o", "%A").split())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (late,) = jobs - {job}
    run.jobs = [job]
    run.wait_for_end()
    assert [(one.job_id, one.reason) for one in run.attempts()] == [(job, "finished")]
    assert f"the run has got job {job} since: this job is one too many" in run.end_of_story()
    assert "ExitCode=93:0" in runs.cluster.ask("scontrol", "show", "job", "-o", late)
    assert lost_iterations(run.path) == 0
    assert run.hashes() == runs.undisturbed(2, *TP2)


@thorough("a submission that was killed stays")
def test_a_job_that_is_alone_joins(runs, tmp_path):
    """Also when nobody gives a command any more."""
    run, programs, _ = submit_and_die(runs, tmp_path, "joins", LATE, "training.train_iters=12")
    (programs / "go").touch()
    run.wait(lambda: bool(noted(run)), "a note", timeout_s=60)
    run.wait_for_end()
    assert "the run has no other: it is the run's now" in run.end_of_story()
    assert runs.mq("status", run.path, "--check") == ""
