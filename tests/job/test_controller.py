"""What a controller makes of what an earlier one left. Whole jobs: tests/slurm, tests/launch/test_local.py."""

import errno
import signal

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.job.records import AttemptRecords
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import Action, Reason
from megatron_qwen.rundir import RunState
from tests.job.controllers import Job, controller, elsewhere, faulty, full


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"job_id": "7", "restarts": 1, "lost": ("n2",)}, "lost node"),
        ({"job_id": "7", "restarts": 1}, "lost peer"),
        ({"job_id": "7", "restarts": 0}, "lost peer"),
        ({"job_id": "8", "restarts": 0}, "lost peer"),
    ],
)
def test_an_attempt_whose_end_nobody_noted(tmp_path, job, reason):
    found = controller(tmp_path, **job)
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    found._close_unfinished()
    (attempt,) = log.read()
    assert attempt.reason == reason
    assert attempt.failed_nodes == (("n2",) if reason == "lost node" else ())
    found._close_unfinished()
    assert len(log.read()) == 1


def test_an_attempt_that_made_steps_was_requeued(tmp_path):
    found = controller(tmp_path, job_id="7", restarts=1)
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    Heartbeat(found.directory.heartbeat, attempt=1, resumed_at=0).beat("training", 5)
    assert found._close_unfinished() is None
    (attempt,) = log.read()
    assert (attempt.reason, attempt.iteration) == ("requeued by hand", 5)


@pytest.mark.parametrize("job", [{"job_id": "8"}, {"job_id": "7", "restarts": 1}])
def test_a_run_whose_first_node_dies_every_time_is_stopped(job, tmp_path):
    """Another job goes on with it, or Slurm has requeued the same one and says nothing of the node, which is back."""
    found = controller(tmp_path, **job)
    log = AttemptLog(found.directory.attempts)
    decisions = []
    for _ in range(4):  # the first is no restart; resilience.max_restarts_without_progress is 3
        log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
        decisions.append(found._close_unfinished())
    assert decisions[:3] == [None, None, None]
    assert decisions[3] is not None
    assert decisions[3].action is Action.STOP
    assert found._settled() == 93
    assert [attempt.exit_code for attempt in log.read()] == [None] * 4


def test_a_node_that_was_lost_twice_is_left(tmp_path):
    found = controller(tmp_path, job_id="7", lost=("n2",), nodes=("n2", "n3"))
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    assert found._close_unfinished() is None
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=1)
    decision = found._close_unfinished()
    assert decision is not None
    assert (decision.action, decision.exclude) == (Action.REQUEUE, ("n2",))
    log.forgive()
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=2)
    assert found._close_unfinished() is None


@pytest.mark.parametrize(
    ("state", "code"),
    [(RunState.DONE, 0), (RunState.STOPPED, 93), (RunState.CANCELLED, 93), (RunState.QUEUED, None), (None, None)],
)
def test_runs_that_need_no_attempt(tmp_path, state, code):
    found = controller(tmp_path)
    if state is not None:
        found.directory.write_status(state)
    assert found._settled() == code


def test_a_cancelled_job_is_not_brought_back(tmp_path):
    found = controller(tmp_path, does=Ending.CANCELLED)
    assert found._cancelled()
    (tmp_path / "other").mkdir()
    by_command = controller(tmp_path / "other")
    assert not by_command._cancelled()
    by_command.directory.write_status(RunState.CANCELLED)
    assert by_command._cancelled()


REQUEUED = Decision(Action.REQUEUE, "lost peer: killed", 76, ())


def test_a_full_disk_does_not_keep_the_job_from_being_requeued(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch)
    monkeypatch.setattr("megatron_qwen.job.records._LATE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(AttemptLog, "end", full)
        assert found.run() == 1
    assert found.allocation.requeued == [120.0]
    (attempt,) = AttemptLog(found.directory.attempts).read()
    assert attempt.ended is None
    # The next start of the job, on a disk that has room again.
    second = elsewhere(tmp_path / "second", monkeypatch, restarts=1, comment=found.allocation.comment)
    second.directory = found.directory
    second.attempts = AttemptLog(found.directory.attempts)
    second.records = AttemptRecords(second.directory, second.attempts, second.allocation)
    assert second.run() == 1
    first, again = second.attempts.read()
    assert (first.reason, first.action, first.exit_code) == ("storage", "requeue", 1)
    assert "No space left on device in" in first.detail
    assert again.reason == "storage"
    assert second.allocation.requeued == [240.0]
    assert second.directory.state() is RunState.REQUEUED


def test_what_could_not_be_written_is_written_before_the_job_ends(tmp_path, monkeypatch):
    found, plain, calls = elsewhere(tmp_path, monkeypatch), AttemptLog.end, []

    def at_the_third_try(self, number, **facts):
        calls.append(number)
        if len(calls) < 3:
            full()
        plain(self, number, **facts)

    monkeypatch.setattr(AttemptLog, "end", at_the_third_try)
    assert found.run() == 1
    (attempt,) = AttemptLog(found.directory.attempts).read()
    assert attempt.reason == "storage"
    assert found.directory.state() is RunState.REQUEUED


def test_an_attempt_that_cannot_be_begun(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch, restarts=2)
    monkeypatch.setattr(AttemptLog, "begin", full)
    assert found.run() == 1
    assert found.allocation.requeued == [600.0]


def test_a_look_that_fails_ends_no_attempt(tmp_path, monkeypatch):
    """One stale file handle of attempts.jsonl, while the ranks are well."""
    found = elsewhere(tmp_path, monkeypatch)
    looks = []

    def stale(_):
        looks.append(1)
        raise OSError(errno.ESTALE, "Stale file handle")

    number = found.attempts.begin(nodes=["n1"])
    assert not found.records.is_superseded(number)
    with monkeypatch.context() as patch:
        patch.setattr(AttemptLog, "newest", stale)
        assert not found.records.is_superseded(number)
    assert looks
    found.attempts.begin(nodes=["n1"])
    assert found.records.is_superseded(number)


def test_an_old_word_does_not_replace_a_newer_one(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch)
    first = found.attempts.begin(nodes=["n1"])
    end = EndOfAttempt.of(first, AttemptOutcome(Reason.LOST_PEER, "killed"), REQUEUED, exit_code=76)
    with monkeypatch.context() as patch:
        patch.setattr(AttemptLog, "end", full)
        found.records.note(end, RunState.REQUEUED)
    found.attempts.begin(nodes=["n1"])
    found.directory.write_status(RunState.DONE)
    found.records.write_late()
    assert found.directory.state() is RunState.DONE
    assert found.attempts.read()[0].reason == "lost peer"
    found.records.write(end, RunState.REQUEUED)
    assert found.directory.attempts.read_text().count('"ended"') == 1


def test_a_job_of_a_chain_waits_before_the_next_one_tries(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch)
    found.settings = JobSettings(scheduler="slurm", signal_delay_s=60, requeue=False)
    waited = []
    monkeypatch.setattr(found, "_wait", waited.append)
    monkeypatch.setattr(Job, "seconds_left", lambda _: 62.0)
    assert found.run() == 1
    assert waited == [50.0], "not longer than the job may run"
    assert found.allocation.requeued == []


@pytest.mark.parametrize("nodes", [("n1",), ("n1", "n2")])
def test_a_disk_without_room_is_no_nodes_fault(nodes, tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch, nodes=nodes)
    found.settings = JobSettings(scheduler="slurm", signal_delay_s=60, health_check=())
    sick = dict.fromkeys(nodes, "0 GiB free on /runs/a, 1 wanted")
    monkeypatch.setattr(found.making, "_sick_nodes", lambda _: sick)
    assert found.run() == 1
    (attempt,) = found.attempts.read()
    assert (attempt.reason, attempt.failed_nodes) == ("storage", ())
    sick[nodes[0]] = "GPU 3 has 2 uncorrected ECC errors"
    assert found.run() in (1, 76)
    assert found.attempts.read()[-1].reason == ("unhealthy node" if len(nodes) == 1 else "error")


def test_an_error_that_is_not_of_the_disk_is_no_reason_to_try_again(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch)

    def missing(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "srun")

    monkeypatch.setattr(found.making, "_with_ranks", missing)
    with pytest.raises(FileNotFoundError):
        found.run()
    assert found.allocation.requeued == []


def test_a_restart_inside_the_allocation(tmp_path, monkeypatch):
    found = faulty(tmp_path, monkeypatch, Reason.LOST_PEER, Reason.HANG, nodes=("n1", "n2"))
    assert found.run() == 0
    first, second, third = found.attempts.read()
    assert (first.action, second.action, third.action) == ("restart", "restart", "none")
    assert found.allocation.requeued == []
    assert found.allocation.groups == [(), ()]
    assert found.directory.state() is RunState.DONE


def test_a_node_that_failed_twice_is_to_be_avoided(tmp_path, monkeypatch):
    found = faulty(tmp_path, monkeypatch, Reason.LOST_PEER, Reason.LOST_PEER)
    assert found.run() == 0
    assert found.allocation.groups == [(), ("n2",)]


@pytest.mark.parametrize(
    ("reason", "job"),
    [
        (Reason.LOST_PEER, {"enough": False}),
        (Reason.LOST_PEER, {"left": (60.0,)}),
        (Reason.OUT_OF_TIME, {}),
        (Reason.STORAGE, {}),
    ],
)
def test_what_sends_the_job_back_to_the_queue(tmp_path, monkeypatch, reason, job):
    found = faulty(tmp_path, monkeypatch, reason, **job)
    assert found.run() != 0
    (attempt,) = found.attempts.read()
    assert attempt.action == "requeue"
    assert len(found.allocation.requeued) == 1
    assert found.directory.state() is RunState.REQUEUED


def test_a_stop_signal_while_nodes_are_chosen(tmp_path, monkeypatch):
    """Slurm ends the job: it goes back to the queue."""
    found = faulty(tmp_path, monkeypatch, Reason.LOST_PEER)

    def told(self, avoid):
        found.signals.received = signal.SIGTERM

    monkeypatch.setattr(Job, "regroup", told)
    assert found.run() == 76
    assert found.attempts.read()[0].action == "requeue"


def test_restarts_without_a_newer_checkpoint_end(tmp_path, monkeypatch):
    found = faulty(tmp_path, monkeypatch)
    monkeypatch.setattr(
        found.making, "make", lambda _: AttemptOutcome(Reason.LOST_PEER, "killed", iteration=3, gained=3)
    )
    assert found.run() == 93
    assert [attempt.action for attempt in found.attempts.read()] == ["restart", "restart", "restart", "stop"]


def test_a_sick_spare_node_ends_no_attempt(tmp_path, monkeypatch):
    found = elsewhere(tmp_path, monkeypatch, nodes=("n1", "n2"), spare_nodes=("n3", "n4"))
    aside = []
    monkeypatch.setattr(Job, "set_aside", lambda _, nodes: aside.extend(nodes))
    sick = {"n3": "7 of 8 GPUs"}
    monkeypatch.setattr(found.making, "_sick_nodes", lambda _: sick)
    assert found.making._unfit(1, tmp_path) is None
    assert aside == ["n3"]
    sick["n2"] = "GPU 3 is at 99 C"
    outcome = found.making._unfit(1, tmp_path)
    assert outcome is not None
    assert (outcome.reason, outcome.failed_nodes) == (Reason.UNHEALTHY_NODE, ("n2",))
    sick |= {"n1": "no driver", "n4": "no driver"}
    outcome = found.making._unfit(1, tmp_path)
    assert outcome is not None
    assert outcome.reason is Reason.ERROR, "a check that fails everywhere blames no node"


def test_a_job_with_spare_nodes_leaves_out_nodes_that_failed_before(tmp_path, monkeypatch):
    """Slurm may have given it such a node again."""
    found = faulty(tmp_path, monkeypatch)
    found.settings = JobSettings(scheduler="slurm", signal_delay_s=60, spares=1)
    for _ in range(2):
        found.attempts.end(found.attempts.begin(), reason="lost peer", failed_nodes=["n2"], action="requeue")
    assert found.run() == 0
    assert found.allocation.groups == [("n2",)]
