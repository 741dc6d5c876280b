"""What a controller sees of jobs: noted or not, in arrays, held."""

import json

import pytest
import yaml

from launch.sweeps.look import look
from launch.sweeps.plan import document, make_plan, write
from launch.sweeps.plan_file import read_plan
from launch.sweeps.study import read_study
from launch.sweeps.study_directory import StudyDirectory
from megatron_qwen import slurm
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import QueuedJob
from tests.launch.sweeps.study_files import SMALL


@pytest.fixture
def seen(study, monkeypatch):
    """How the runs look to a controller, with these jobs in Slurm's queue."""
    runs = study.all_runs(study.plan())

    def answer(*jobs):
        queue = {job.job_id: job for job in jobs}
        monkeypatch.setattr(slurm, "is_there", lambda: True)
        monkeypatch.setattr(slurm, "queue", lambda: queue)
        rows = look(study, runs, {})
        return [(rows[run.name].status, rows[run.name].why) for run in runs]

    return answer


def job(number, name, state="RUNNING", reason="None", priority="1"):
    return QueuedJob(number, state, reason, "1:00", "9:00", "n1", "now", name, priority)


def begin(study, run, number, state=RunState.RUNNING):
    directory = RunDirectory(study.runs / run.name)
    directory.path.mkdir()
    entry = {"jobs": [number], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}
    directory.jobs.write_text(json.dumps(entry) + "\n")
    directory.write_status(state)


def test_a_job_that_nobody_noted_is_found_by_its_name(study, seen):
    first, *_ = study.all_runs(study.plan())
    assert seen() == [("ready", "")] * 3
    assert seen(job("5", study.job_name(first))) == [("active", ""), ("ready", ""), ("ready", "")]
    assert seen(job("5", study.job_name(first), "FAILED")) == [("ready", "")] * 3
    assert seen(job("5", first.name)) == [("ready", "")] * 3  # somebody else's job of the same model


def test_members_of_an_array_that_nobody_noted_are_found_by_its_name(study, seen):
    first, second, _ = study.all_runs(study.plan())
    name = study.note_array([first, second])
    assert seen() == [("ready", "")] * 3  # sbatch never came to it
    assert seen(job("7_0", name), job("7_1", name, "PENDING")) == [("active", ""), ("active", ""), ("ready", "")]
    # One task has ended, and of two it is not known which: neither is started again before the array is over.
    assert seen(job("7_0", name, "COMPLETED"), job("7_1", name)) == [("active", ""), ("active", ""), ("ready", "")]
    assert study.note_array([second]) != name


def test_noted_members_stand_for_themselves(study, seen):
    first, second, _ = study.all_runs(study.plan())
    name = study.note_array([first, second])
    begin(study, first, "7_0")
    begin(study, second, "7_1")
    assert seen(job("7_0", name, "NODE_FAIL"), job("7_1", name)) == [("ready", ""), ("active", ""), ("ready", "")]


def test_a_run_that_was_lost_and_went_again_in_an_array_nobody_noted(study, seen):
    first, second, _ = study.all_runs(study.plan())
    begin(study, first, "3_0", RunState.QUEUED)
    name = study.note_array([first, second])
    assert seen(job("9_0", name), job("9_1", name)) == [("active", ""), ("active", ""), ("ready", "")]


def test_a_run_that_was_lost_and_went_again_alone(study, seen):
    first, *_ = study.all_runs(study.plan())
    begin(study, first, "5", RunState.QUEUED)
    assert seen(job("6", study.job_name(first)))[0] == ("active", "")
    assert seen(job("5", study.job_name(first), "NODE_FAIL"))[0] == ("ready", "")


def test_a_member_that_left_its_array_stands_for_itself(study, seen):
    """Lost from an array that lives on, handed over again as job 11, and now over."""
    first, second, _ = study.all_runs(study.plan())
    name = study.note_array([first, second])
    begin(study, first, "7_0")
    begin(study, second, "7_1", RunState.QUEUED)
    directory = RunDirectory(study.runs / second.name)
    with directory.jobs.open("a") as file:
        file.write(json.dumps({"jobs": ["11"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    assert seen(job("7_0", name), job("11", study.job_name(second), "COMPLETED"))[1] == ("ready", "")


def test_a_held_job_says_so(study, seen):
    first, *_ = study.all_runs(study.plan())
    begin(study, first, "4")
    held = job("4", study.job_name(first), "PENDING", "JobHeldUser", "0")
    assert seen(held)[0] == ("active", "held by Slurm (JobHeldUser): scontrol release 4")


@pytest.mark.parametrize(
    ("losses", "status"), [([5.0, 4.0] * 5, "ready"), ([3.0] * 5 + [5.0] * 5, "diverged")], ids=["good", "diverged"]
)
def test_a_branch_of_a_stem_that_had_diverged_by_then_is_not_run(losses, status, tmp_path):
    """Its stem is still under way, and has saved the checkpoint of iteration 10 that the branch waits for."""
    content = SMALL | {"schedule": "wsd", "learning_rate": {"values": [1e-3]}, "decay_share": 0.5}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    write(tmp_path / "plan.yaml", document(make_plan(read_study(tmp_path / "study.yaml"))))
    study = StudyDirectory(tmp_path / "study")
    study.claim(read_plan(tmp_path / "plan.yaml"))
    runs = study.all_runs(study.plan())
    stem, branch = runs
    directory = RunDirectory(study.runs / stem.name)
    (directory.checkpoints / f"iter_{branch.begins:07d}").mkdir(parents=True)
    records = [{"iteration": number, "lm_loss": loss} for number, loss in enumerate(losses, start=1)]
    directory.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = look(study, runs, {}, ask=False)[branch.name]
    assert (branch.begins, found.status) == (10, status)
    assert found.why.startswith("its stem diverged before it") is (status == "diverged")
