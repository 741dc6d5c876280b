"""What allows a restart inside the allocation, before the nodes are looked at."""

import pytest

from megatron_qwen.attempts import Attempt
from megatron_qwen.resilience.policy import AttemptOutcome, Decision, decide
from megatron_qwen.resilience.restart import JobSituation, is_barren, why_requeue
from megatron_qwen.resilience.rules import RULES, Action, Reason


def why(reason: Reason, **changes) -> str | None:
    situation = {
        "enabled": True,
        "stopping": False,
        "seconds_left": 3600.0,
        "signal_delay_s": 300.0,
        "barren_before": False,
    }
    situation |= {name: value for name, value in changes.items() if name in situation}
    outcome = AttemptOutcome(
        reason, "it happened", iteration=changes.get("iteration", 20), gained=changes.get("gained", 0)
    )
    decision = Decision(Action.REQUEUE, "", 76, (), changes.get("delay_s", 0.0))
    return why_requeue(outcome, decision, JobSituation(**situation))


def test_the_rows_that_allow_it():
    """Faults of ranks and nodes; not what Slurm or a person decided, nor a full disk."""
    rows = [reason for reason, rule in RULES.items() if rule.action is Action.REQUEUE]
    assert len(rows) >= 9
    forbidden = {Reason.PREEMPTED, Reason.OUT_OF_TIME, Reason.REQUEUED, Reason.STORAGE}
    assert {reason for reason in rows if why(reason) is not None} == forbidden


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enabled": False}, "restart_in_job is false"),
        ({"stopping": True}, "told to stop"),
        ({"delay_s": 120.0}, "has to wait"),
        ({"seconds_left": 599.0}, "599 s are left before the time limit, 600 are needed"),
        ({"seconds_left": -1.0}, "0 s are left"),
        ({"seconds_left": 600.0}, None),
        ({"seconds_left": None}, None),
    ],
)
def test_what_else_forbids_it(changes, said):
    found = why(Reason.LOST_PEER, **changes)
    assert (found is None) if said is None else said in str(found)


def test_an_error_before_the_first_step():
    """srun refused the step, or the health check failed on every node: other nodes may help."""
    assert "before its first step" in str(why(Reason.ERROR, iteration=None))
    assert why(Reason.ERROR) is None
    assert why(Reason.LOST_PEER, iteration=None) is None


def test_one_restart_at_once_without_an_iteration():
    """During an outage restarts would use up the run's tries within minutes."""
    for reason in (Reason.LOST_PEER, Reason.HANG, Reason.ERROR, Reason.LOST_NODE):
        assert why(reason) is None
        assert "no iteration" in str(why(reason, barren_before=True))
        assert why(reason, barren_before=True, gained=1) is None
    assert why(Reason.UNHEALTHY_NODE, barren_before=True) is None, "the node is replaced"
    assert is_barren("lost peer", 0)
    assert is_barren("error", None)
    for reason, gained in (("lost peer", 1), ("unhealthy node", 0), ("preempted", 0), (None, None), ("of old", 0)):
        assert not is_barren(reason, gained)


def test_a_second_unhealthy_node_is_replaced_at_once():
    """In the queue it would wait."""
    assert why(Reason.UNHEALTHY_NODE, delay_s=120.0) is None


def test_a_restart_counts_as_a_requeue_does():
    """The policy reads reasons, not actions."""

    def stopped_after(action: str) -> int:
        earlier: list[Attempt] = []
        for number in range(1, 9):
            outcome = AttemptOutcome(Reason.LOST_PEER, "killed", saved=10)
            if decide(earlier, outcome, max_restarts_without_progress=3).action is Action.STOP:
                return number
            earlier.append(Attempt(number, "2026-01-01T00:00:00+00:00", reason="lost peer", saved=10, action=action))
        raise AssertionError("never")

    assert stopped_after("restart") == stopped_after("requeue") == 4
