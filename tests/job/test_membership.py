"""A job that starts: the run's, one too many, or one that joins."""

import json

import pytest

from megatron_qwen.job import membership
from megatron_qwen.job.membership import joins
from megatron_qwen.rundir import RunDirectory


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "_NOTE_WAIT_S", 0.2)
    monkeypatch.setattr(membership, "_POLL_S", 0.05)
    return RunDirectory(tmp_path)


def note(run, *jobs, **facts):
    with run.jobs.open("a") as file:
        file.write(json.dumps({"jobs": list(jobs), "scheduler": "slurm", "cluster": "cpu", "nodes": 2, **facts}) + "\n")


def newest(run):
    return json.loads(run.jobs.read_text().splitlines()[-1])


def nobody(jobs):
    return []


def test_the_job_of_the_newest_submission(run):
    note(run, "7")
    note(run, "8", "9")
    assert joins(run, "9", others=pytest.fail)


def test_one_that_is_alone_is_noted(run):
    note(run, "7")
    assert joins(run, "8", others=nobody)
    assert newest(run) == {"jobs": ["8"], "scheduler": "slurm", "cluster": "cpu", "nodes": 2, "adopted": True}
    run.jobs.unlink()
    run.submitting.write_text(json.dumps({"scheduler": "slurm", "cluster": "x", "nodes": 3, "pid": 1, "folder": "f"}))
    assert joins(run, "9", others=nobody)
    assert newest(run) == {"jobs": ["9"], "scheduler": "slurm", "cluster": "x", "nodes": 3, "adopted": True}


@pytest.mark.parametrize("job", ["8", "7"])
def test_one_too_many_leaves(run, job):
    """One that nobody has noted, and one of an earlier submission."""
    note(run, "7")
    note(run, "10")
    before = run.jobs.read_text()
    assert not joins(run, job, others=lambda jobs: [one for one in jobs if one == "10"])
    assert run.jobs.read_text() == before


def test_a_submission_that_notes_it_a_little_later(run):
    run.submitting.write_text("{}")

    def late(_):
        pytest.fail("it was noted in time")

    original = membership._submissions
    looks = []

    def submissions(directory):
        looks.append(1)
        if len(looks) == 2:
            note(run, "7")
        return original(directory)

    membership._submissions = submissions
    try:
        assert joins(run, "7", others=late)
    finally:
        membership._submissions = original


def test_a_submission_that_has_ended_and_is_not_to_be_seen_yet(run, monkeypatch):
    """submitting.json is gone, and the file system shows the line of jobs.jsonl late."""
    run.submitting.write_text("{}")
    monkeypatch.setattr(membership, "_announced", lambda directory: run.submitting.unlink())
    assert joins(run, "7", others=nobody)
    assert not run.jobs.exists()


def test_one_that_was_started_in_another_way(run):
    assert joins(run, "7", others=pytest.fail)
    assert not run.jobs.exists()
