"""What a controller tells other runs of bad nodes, hears from them, and asks of Slurm."""

import json
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.job.allocation import LocalAllocation
from megatron_qwen.job.avoiding import Avoided
from megatron_qwen.job.bad_nodes import BadNodes
from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.resilience.evidence import FailureEvidence, Sign
from megatron_qwen.resilience.policy import AttemptOutcome, Decision, decide
from megatron_qwen.resilience.quarantine import Quarantine, utc_now
from megatron_qwen.resilience.rules import Action, Reason
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import SlurmError
from tests.job.test_controller import controller


@dataclass(frozen=True)
class Job(LocalAllocation):
    """A job whose scheduler keeps all nodes but n9 out."""

    asked: list[tuple[str, list[str], set[str]]] = field(default_factory=list)
    refuses: bool = False

    def avoid(self, wanted, *, asked_before, job_id):
        self.asked.append((job_id, list(wanted), set(asked_before)))
        if self.refuses:
            raise SlurmError("scontrol: no")
        kept = tuple(node for node in wanted if node != "n9")
        return Avoided(kept, tuple({*wanted} - {*kept}), "too few others" if "n9" in wanted else "")


class Run:
    """A run in a run root.

    Args:
        root: the run root.
        name: of the run.
        hours: of a quarantine.
        job: facts of its allocation.
    """

    def __init__(self, root, name="run", *, hours=24.0, **job) -> None:
        self.store = Quarantine(root / ".quarantine")
        self.directory = RunDirectory(root / name)
        self.directory.path.mkdir(parents=True, exist_ok=True)
        self.log = AttemptLog(self.directory.attempts)
        shared = str(self.store.path) if hours else None
        settings = JobSettings(scheduler="slurm", signal_delay_s=60, quarantine=shared, quarantine_hours=hours)
        self.job = Job(settings, 2, **{"job_id": "7", **job})
        self.bad_nodes = BadNodes(self.directory, settings, self.log, self.job)

    def fails(self, node: str, rank: int, *, gained=20, sign=Sign.KILLED, reason=Reason.LOST_PEER) -> Decision:
        """An attempt ends so."""
        number = self.log.begin(nodes=["n1", node], job_id="7")
        evidence = FailureEvidence(sign, rank, node, "SIGKILL")
        outcome = AttemptOutcome(reason, "so", (node,), gained=gained, saved=10 * number, evidence=evidence)
        earlier = [attempt for attempt in self.log.since_forgiven() if attempt.number < number]
        decision = decide(self.bad_nodes.still_counting(earlier), outcome, max_restarts_without_progress=3)
        self.log.end(number, **EndOfAttempt.of(number, outcome, decision, exit_code=76).facts)
        self.bad_nodes.tell(number, outcome, decision)
        return decision

    def quarantined(self) -> list[str]:
        return [entry.node for entry in self.store.in_force()]


def test_a_bad_node_is_told_to_other_runs(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path, "other")
    assert run.fails("n3", 1).exclude == ()
    assert run.quarantined() == []
    decision = run.fails("n3", 0, gained=90)
    assert decision.exclude == ("n3",)
    (entry,) = run.store.in_force()
    assert (entry.node, entry.by, entry.runs) == ("n3", "controller", (str(run.directory.path),))
    assert [one.attempt for one in entry.evidence] == [1, 2]
    assert entry.why == "n3 has failed 2 times (ranks 0 and 1)"
    assert other.bad_nodes.wanted(Decision(Action.REQUEUE, "", 76, ("n2",))) == ["n2", "n3"]


def test_a_program_puts_no_node_into_quarantine(tmp_path):
    run = Run(tmp_path)
    for node in ("n3", "n4", "n5", "n3", "n4"):
        assert run.fails(node, 1).exclude == ()
        assert run.quarantined() == []
    run = Run(tmp_path, "second")
    for _ in range(4):
        run.fails("n3", 1, sign=Sign.MEMORY)
        assert run.quarantined() == []


def test_a_node_is_cleared_when_the_program_is_found_out(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path, "other")
    run.fails("n3", 1, gained=20)
    assert run.fails("n3", 1, gained=90).exclude == ("n3",)
    assert run.quarantined() == [], "each time the same rank: the run goes elsewhere, and that tells"
    run.fails("n3", 0)
    assert run.quarantined() == ["n3"]
    assert run.fails("n4", 1).exclude == ()
    assert run.quarantined() == []
    # Where another run has found it bad too, it stays.
    other.fails("n5", 0)
    other.fails("n5", 1)
    run = Run(tmp_path, "third")
    run.fails("n5", 1, gained=20)
    run.fails("n5", 1, gained=90)
    run.fails("n5", 0)
    run.fails("n6", 1)
    assert run.quarantined() == ["n5"]


def test_a_node_that_was_lifted_needs_two_new_failures(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.fails("n3", 0)
    run.fails("n3", 1)
    run.store.lift("n3")
    assert run.bad_nodes.wanted(Decision(Action.REQUEUE, "", 76, ())) == []
    later = [
        Attempt(number, "2999-01-01T00:00:00+00:00", reason="lost peer", failed_nodes=("n3",)) for number in (8, 9)
    ]
    kept = run.bad_nodes.still_counting([*run.log.read(), *later])
    assert [attempt.failed_nodes for attempt in kept] == [(), (), ("n3",), ("n3",)]


@pytest.mark.parametrize("hours", [24.0, 0.0])
def test_a_failure_counts_for_a_day(tmp_path, hours):
    run = Run(tmp_path, hours=hours)
    old = Attempt(
        1,
        "2026-01-01T00:00:00+00:00",
        ended="2026-01-01T01:00:00+00:00",
        reason="lost peer",
        failed_nodes=("n3",),
        evidence=FailureEvidence(Sign.KILLED, 1, "n3").as_dict(),
    )
    (kept,) = run.bad_nodes.still_counting([old])
    assert kept.failed_nodes == (() if hours else ("n3",))
    assert kept.evidence == old.evidence, "the program may need days for the same fault"


def test_the_end_of_a_connection_is_forgotten_too(tmp_path):
    run = Run(tmp_path)
    link = FailureEvidence(Sign.CONNECTION, 0, "n1", ends=("n3",)).as_dict()
    now = "2999-01-01T00:00:00+00:00"
    new = Attempt(1, now, ended=now, reason="lost peer", evidence=link)
    old = replace(new, ended="2026-01-01T00:00:00+00:00")
    assert [one.evidence.get("ends") for one in run.bad_nodes.still_counting([old, new])] == [None, ["n3"]]
    run.store.put("n3", hours=1, by="ann", why="x")
    run.store.lift("n3")
    lifted = replace(new, ended=str(utc_now() - timedelta(hours=1)))
    assert run.bad_nodes.still_counting([lifted])[0].evidence.get("ends") is None


def test_what_slurm_is_asked_and_what_is_noted(tmp_path):
    run = Run(tmp_path)
    run.directory.jobs.write_text(json.dumps({"jobs": ["7"], "exclude": ["n8"]}) + "\n")
    run.fails("n3", 0)
    decision = run.fails("n3", 1)
    run.store.put("n9", hours=1, by="ann", why="by hand")
    run.directory.write_status(RunState.REQUEUED, attempt=2, job_id="7", avoid=["n6"])
    run.bad_nodes.avoid(decision)
    assert run.job.asked == [("7", ["n3", "n9"], {"n8"})]
    noted = json.loads(run.directory.status.read_text())
    assert (noted["avoid"], noted["not_avoided"], noted["attempt"]) == (["n3"], ["n9"], 2)
    assert noted["why_not_avoided"] == "too few others"
    # At the next requeue they are known not to be a person's, whoever lifted them meanwhile.
    run.directory.write_status(RunState.RUNNING, attempt=3, job_id="7")
    run.bad_nodes.avoid(Decision(Action.REQUEUE, "", 76, ()))
    assert run.job.asked[-1][2] == {"n3", "n8", "n9"}
    assert len(run.log.read()) == 2
    assert run.log.newest() == 2


@pytest.mark.parametrize(
    "facts", [{"state": RunState.QUEUED, "job_id": "7"}, {"state": RunState.REQUEUED, "job_id": "8"}]
)
def test_another_word_in_the_status_stays(tmp_path, facts):
    run = Run(tmp_path)
    run.directory.write_status(**facts)
    before = run.directory.status.read_text()
    run.bad_nodes.avoid(Decision(Action.REQUEUE, "", 76, ("n3",)))
    assert run.directory.status.read_text() == before


def test_the_jobs_that_follow_in_a_chain(tmp_path):
    run = Run(tmp_path, job_id="8")
    run.directory.jobs.write_text('{"jobs": ["5"]}\n{"jobs": ["7", "8", "9", "10"]}\n{"jo')
    run.bad_nodes.avoid(Decision(Action.REQUEUE, "", 76, ("n3",)))
    assert [job for job, _, _ in run.job.asked] == ["9", "10"]


def test_what_slurm_refuses_is_not_in_force(tmp_path):
    run = Run(tmp_path, refuses=True)
    run.directory.write_status(RunState.REQUEUED, job_id="7")
    run.bad_nodes.avoid(Decision(Action.REQUEUE, "", 76, ("n3",)))
    noted = json.loads(run.directory.status.read_text())
    assert (noted["avoid"], noted["not_avoided"]) == ([], ["n3"])


def test_a_quarantine_that_cannot_be_used_ends_nothing(tmp_path):
    run = Run(tmp_path)
    run.store.path.write_text("not a directory")
    run.fails("n3", 0)
    assert run.fails("n3", 1).exclude == ("n3",)
    assert run.bad_nodes.wanted(Decision(Action.REQUEUE, "", 76, ("n3",))) == ["n3"]


def test_a_node_that_was_set_free_is_used_again(tmp_path, monkeypatch):
    """Before an attempt with spare nodes too: what no longer speaks against a node keeps it out of nothing."""
    found = controller(tmp_path, job_id="7", nodes=("n1", "n2"))
    store = Quarantine(tmp_path / ".quarantine")
    settings = replace(found.settings, spares=1, quarantine=str(store.path), quarantine_hours=24.0)
    found.settings, found.bad_nodes = settings, BadNodes(found.directory, settings, found.attempts, found.allocation)
    for _ in range(2):
        number = found.attempts.begin(nodes=["n1", "n2"], job_id="7")
        found.attempts.end(number, reason="lost node", failed_nodes=["n2"], action="requeue")
    monkeypatch.setattr(found.making, "make", lambda number: AttemptOutcome(Reason.FINISHED, ""))
    found._attempt()
    assert found.allocation.groups == [("n2",)]
    store.put("n2", hours=24, by="controller", why="it was lost twice")
    store.lift("n2")
    found._attempt()
    assert found.allocation.groups == [("n2",)]
