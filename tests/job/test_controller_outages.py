"""What a controller does when a cancel or an outage comes at a bad moment, and which nodes it leaves."""

import errno

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.job.records import AttemptRecords
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.resilience.policy import AttemptOutcome
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.rundir import RunState
from tests.job.controllers import Job, elsewhere, faulty, full


def test_restarts_without_an_iteration_leave_the_job(tmp_path, monkeypatch):
    """An outage: the second attempt in a row that finishes no iteration goes back to the queue."""
    found = faulty(tmp_path, monkeypatch)
    monkeypatch.setattr(found.making, "make", lambda _: AttemptOutcome(Reason.LOST_PEER, "killed"))
    assert found.run() == 76
    assert [attempt.action for attempt in found.attempts.read()] == ["restart", "requeue"]
    assert len(found.allocation.requeued) == 1


@pytest.mark.parametrize("reason", [Reason.STRAGGLER, Reason.CORRUPTION])
def test_a_slow_or_a_wrong_node_is_left_out_at_once(tmp_path, monkeypatch, reason):
    """Also of the attempts after it."""
    found = faulty(tmp_path, monkeypatch, reason, Reason.HANG, nodes=("n1", "n3"), spare_nodes=("n2",))
    found.settings = JobSettings(scheduler="slurm", signal_delay_s=60, spares=1)
    assert found.run() == 0
    assert [attempt.action for attempt in found.attempts.read()] == ["restart", "restart", "none"]
    assert set(found.allocation.groups) == {("n2",)}
    assert len(found.allocation.groups) == 4, "after each of two faults, and before each of two attempts"


def test_a_cancel_while_nodes_are_chosen(tmp_path, monkeypatch):
    found = faulty(tmp_path, monkeypatch, Reason.LOST_PEER)

    def cancelled(self, avoid):
        found.directory.write_status(RunState.CANCELLED, job_id="7")
        return "it was cancelled"

    monkeypatch.setattr(Job, "regroup", cancelled)
    assert found.run() == 143
    assert [(attempt.reason, attempt.action) for attempt in found.attempts.read()] == [("cancelled", "none")]
    assert found.allocation.requeued == []
    assert found.directory.state() is RunState.CANCELLED


def test_a_cancel_after_the_decision(tmp_path, monkeypatch):
    """It came between the last look and the note: neither the note nor a requeue undoes it."""
    found = faulty(tmp_path, monkeypatch, Reason.LOST_PEER, enough=False)
    plain = AttemptRecords.note

    def cancelled(self, end, state):
        found.directory.write_status(RunState.CANCELLED, job_id="7")
        plain(self, end, state)

    monkeypatch.setattr(AttemptRecords, "note", cancelled)
    assert found.run() == 93
    assert found.attempts.read()[0].action == "requeue"
    assert found.allocation.requeued == []
    assert found.directory.state() is RunState.CANCELLED


def test_a_run_directory_that_is_gone_for_a_while(tmp_path, monkeypatch):
    """Its file system is not mounted any more: no newer attempt has begun, and the job tries again."""
    found = elsewhere(tmp_path, monkeypatch)
    monkeypatch.setattr("megatron_qwen.job.records._LATE_S", 0.1)
    away = tmp_path / "away"

    def unmount(number, logs):
        found.directory.path.rename(away)
        assert not found.records.is_superseded(number)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(found.making, "_with_ranks", unmount)
    assert found.run() == 1
    assert found.allocation.requeued == [120.0]
    kept = EndOfAttempt.from_text(found.allocation.comment[0])
    assert kept is not None
    assert (kept.number, kept.facts["reason"]) == (1, "storage")
    found.allocation.requeued.clear()
    assert found.run() == 1, "it is still gone"
    assert found.allocation.requeued == [600.0]
    assert not found.directory.path.exists()


def test_what_nobody_knows_lifts_no_excluded_node(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch)
    asked = []
    monkeypatch.setattr(found.bad_nodes, "avoid", asked.append)
    with monkeypatch.context() as patch:
        patch.setattr(AttemptLog, "begin", full)
        assert found.run() == 1
    assert asked == []
    assert found.run() == 1
    assert len(asked) == 1, "an attempt that was begun"
