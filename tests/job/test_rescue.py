"""What the batch script does when its controller is gone. On a real cluster: tests/slurm/test_storage.py."""

import pytest

from megatron_qwen import slurm
from megatron_qwen.errors import Problem
from megatron_qwen.job import rescue as module

ENVIRON = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "1", "SLURM_RESTART_COUNT": "2"}


@pytest.fixture
def asked(monkeypatch):
    """Commands that reach Slurm, whose job runs."""
    found: list[tuple[str, ...]] = []
    state = {"JobState": "RUNNING", "Restarts": "2", "Comment": "(null)"}

    def ask(*command: str, **_: object) -> str:
        if command[:3] == ("scontrol", "show", "job"):
            return " ".join(f"{name}={value}" for name, value in state.items())
        found.append(command)
        if command[1] == "requeue":
            state.update(JobState="PENDING", Restarts="3")
        return ""

    monkeypatch.setattr(slurm, "ask", ask)
    return found, state


@pytest.mark.parametrize("code", [137, 139, 1, 75, 76])
def test_a_job_that_nobody_has_requeued(code, asked):
    found, _ = asked
    assert module.rescue(code, ENVIRON)
    assert found == [("scontrol", "requeue", "7"), ("scontrol", "update", "JobId=7", "StartTime=now+120")]


@pytest.mark.parametrize("code", [0, 2, 93, 130, 143])
def test_a_decision_stands(code, asked):
    assert not module.rescue(code, ENVIRON)
    assert asked[0] == []


@pytest.mark.parametrize(
    "change", [{"Restarts": "3"}, {"JobState": "PENDING"}, {"JobState": "CANCELLED"}, {"JobState": "COMPLETING"}]
)
def test_what_slurm_does_stands(change, asked):
    asked[1].update(change)
    assert not module.rescue(137, ENVIRON)
    assert asked[0] == []


def test_not_for_ever_and_not_outside_a_job(asked):
    assert not module.rescue(137, {**ENVIRON, "SLURM_RESTART_COUNT": "1000"})
    assert not module.rescue(137, {})
    assert asked[0] == []


def test_a_slurm_that_refuses(asked, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise slurm.SlurmError(Problem("scontrol requeue", None, "Requested operation is presently disabled"))

    monkeypatch.setattr(module.SlurmAllocation, "requeue", refuse)
    assert not module.rescue(137, ENVIRON)


def test_a_requeue_whose_answer_was_lost_is_not_made_twice(asked, monkeypatch):
    """Slurm has taken it, and has started the job elsewhere by the time that it answers again."""
    found, state = asked
    plain, answers_lost = slurm.ask, []

    def lost(*command: str, **more: object) -> str:
        answer = plain(*command, **more)
        if command[1] == "requeue" and not answers_lost:
            answers_lost.append(command)
            state.update(JobState="RUNNING")
            raise slurm.SlurmError(Problem("scontrol requeue", None, "Socket timed out"))
        return answer

    monkeypatch.setattr(slurm, "ask", lost)
    monkeypatch.setattr("megatron_qwen.job.slurm_allocation.time.sleep", lambda _: None)
    assert module.rescue(137, ENVIRON)
    assert found == [("scontrol", "requeue", "7")], "and its start is not put off"
