"""What a controller sees of jobs: noted or not, in arrays, held."""

import json
import re
import shutil

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

STUDY = {
    "recipe": "tiny_dense",
    "shapes": {"models": [{"num_layers": 2}]},
    "horizons": {"tokens": [5120]},
    "learning_rate": {"values": [0.001, 0.002, 0.004]},
    "batch_tokens": {"values": [256]},
    "schedule": "cosine",
    "device": {"tflops": 0.01},
}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    write(tmp_path / "plan.yaml", document(make_plan(read_study(tmp_path / "study.yaml"))))
    found = StudyDirectory(tmp_path / "study")
    found.claim(read_plan(tmp_path / "plan.yaml"))
    return found


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


def test_a_torn_note_of_an_array_loses_no_other(study):
    first, second, third = study.all_runs(study.plan())
    one = study.note_array([first])
    with study.arrays_jsonl.open("a") as file:
        file.write('{"name": "forty')  # a full disk
    two, three = study.note_array([second]), study.note_array([third])
    assert len({one, two, three}) == 3
    assert study.arrays() == {one: [first.name], two: [second.name], three: [third.name]}


def test_an_array_has_a_name_that_lists_can_hold(tmp_path):
    name = StudyDirectory(tmp_path / "a|b c").note_array([]) if (tmp_path / "a|b c").mkdir() is None else ""
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def test_a_branch_begins_a_step_late_where_its_stem_was_saved_late(tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(STUDY | {"schedule": "wsd", "learning_rate": {"values": [1e-3]}, "decay_share": 0.5})
    )
    write(tmp_path / "plan.yaml", document(make_plan(read_study(tmp_path / "study.yaml"))))
    study = StudyDirectory(tmp_path / "study")
    study.claim(read_plan(tmp_path / "plan.yaml"))
    stem, branch = study.all_runs(study.plan())
    assert (branch.begins, branch.iterations) == (10, 20)
    checkpoints = study.runs / stem.name / "checkpoints"

    def saved(*iterations):
        shutil.rmtree(checkpoints, ignore_errors=True)
        for iteration in iterations:
            (checkpoints / f"iter_{iteration:07d}").mkdir(parents=True)
        return study.branching_point(branch)

    assert saved() is None
    assert saved(9, 12) is None  # too late
    assert saved(9, 10, 11)[0] == 10
    assert saved(9, 11, 12)[0] == 11
    words = study.overrides(branch)
    assert f"checkpoint.branch_from={checkpoints}/iter_0000011" in words
    assert "optim.lr_wsd_decay_iters=9" in words


def test_a_held_job_says_so(study, seen):
    first, *_ = study.all_runs(study.plan())
    begin(study, first, "4")
    held = job("4", study.job_name(first), "PENDING", "JobHeldUser", "0")
    assert seen(held)[0] == ("active", "held by Slurm (JobHeldUser): scontrol release 4")
