"""Answers of Slurm's programs, whatever people have written into them."""

import pytest

from megatron_qwen import slurm
from megatron_qwen.errors import Problem


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Puts a program on PATH that says given bytes."""

    def say(answer: bytes, code: int = 0) -> None:
        (tmp_path / "answer").write_bytes(answer)
        program = tmp_path / "scontrol"
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'answer'}\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return say


def test_a_reason_in_another_encoding(scontrol):
    """An administrator's Latin-1."""
    scontrol("NodeName=n1 State=DOWN Reason=Lüfter defekt [root@2026]\n".encode("latin-1"))
    assert slurm.show_nodes() == {"n1": {"NodeName": "n1", "State": "DOWN", "Reason": "L\ufffdfter defekt [root@2026]"}}


def test_a_refusal_in_another_encoding(scontrol):
    scontrol("Zugriff verweigert für n1\n".encode("latin-1"), code=1)
    with pytest.raises(slurm.SlurmError, match="Zugriff verweigert f\ufffdr n1"):
        slurm.show_nodes()


def test_jobs_by_id(monkeypatch):
    asked = []

    def answer(*command, **_):
        asked.append(command[command.index("-j") + 1])
        return "7|RUNNING|None|1:00|9:00|n[1-2]|now|a run|100|n[3-4]|a comment | of a person\n"

    monkeypatch.setattr(slurm, "ask", lambda *command: answer(*command))
    assert slurm.jobs(["7", "8", "7"])["7"].nodes == "n[1-2]"
    job = slurm.jobs(["7"])["7"]
    assert (job.excluded, job.comment) == ("n[3-4]", "a comment | of a person")
    assert asked.pop() == "7"
    assert asked == ["7,8"]
    assert len(slurm.jobs([str(one) for one in range(2500)])) == 1
    assert [one.count(",") for one in asked[1:]] == [999, 999, 499]


def test_a_job_that_slurm_has_forgotten(monkeypatch):
    def refuse(*_):
        raise slurm.SlurmError(Problem("squeue", None, why))

    monkeypatch.setattr(slurm, "ask", refuse)
    why = "slurm_load_jobs error: Invalid job id specified"
    assert slurm.jobs(["9"]) == {}
    why = "slurm_load_jobs error: Unable to contact slurm controller"
    with pytest.raises(slurm.SlurmError):
        slurm.jobs(["9"])
