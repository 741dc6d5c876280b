"""The requeue policy: every row of the table, and the rules that read it."""

import pytest

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.resilience.policy import POLICY, RULES, Action, AttemptOutcome, Reason, decide, excluded_nodes


def ended(
    number: int, reason: Reason | None, *, saved: int = 0, gained: int = 5, nodes=(), error=None, iteration=5
) -> Attempt:
    return Attempt(
        number=number,
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T01:00:00+00:00",
        reason=None if reason is None else str(reason),
        saved=saved,
        gained=gained,
        failed_nodes=tuple(nodes),
        error=error,
        iteration=iteration,
    )


def after(earlier, outcome, limit: int = 3):
    return decide(earlier, outcome, max_restarts_without_progress=limit)


def test_every_reason_has_one_row():
    assert sorted(rule.reason for rule in POLICY) == sorted(Reason)


@pytest.mark.parametrize("reason", list(Reason))
def test_a_first_end(reason):
    decision = after([], AttemptOutcome(reason, "so it was"))
    assert decision.action is RULES[reason].action
    assert decision.exit_code == RULES[reason].exit_code
    assert (decision.exit_code == 93) is (decision.action is Action.STOP)


@pytest.mark.parametrize("reason", [rule.reason for rule in POLICY if rule.counted])
def test_three_restarts_without_progress_stop(reason):
    earlier = [ended(number, reason, saved=10) for number in range(1, 4)]
    for so_far in range(3):
        assert after(earlier[:so_far], AttemptOutcome(reason, "again", saved=10)).action is Action.REQUEUE
    # The first attempt saved 10; the three restarts after it nothing newer.
    decision = after(earlier, AttemptOutcome(reason, "again", saved=10))
    assert (decision.action, decision.exit_code) == (Action.STOP, 93)
    assert "3 restarts without a newer checkpoint" in decision.why


def test_the_first_step_that_is_saved_is_progress():
    first = ended(1, Reason.LOST_PEER, saved=0)
    assert after([first], AttemptOutcome(Reason.LOST_PEER, "again", saved=0), limit=1).action is Action.STOP
    assert after([first], AttemptOutcome(Reason.LOST_PEER, "again", saved=1), limit=1).action is Action.REQUEUE


def test_what_a_decision_says():
    nodes = ("n7",)
    sick = [ended(1, Reason.UNHEALTHY_NODE, nodes=nodes, saved=5)]
    done = after(sick, AttemptOutcome(Reason.FINISHED, "all steps are done"))
    assert (done.why, done.exclude) == ("all steps are done", nodes)
    wrong = after(sick, AttemptOutcome(Reason.DATA, "rank 3: a token file is damaged"))
    assert wrong.why == "rank 3: a token file is damaged; a restart would fail in the same way"
    assert wrong.exclude == nodes
    lost = after(sick, AttemptOutcome(Reason.LOST_NODE, "Slurm reports n2 down", ("n2",), saved=9))
    assert (lost.why, lost.exclude) == ("lost node: Slurm reports n2 down", nodes)
    error = "ValueError at step.py:59"
    sick.append(ended(2, Reason.ERROR, error=error, iteration=24, saved=9))
    twice = after(sick, AttemptOutcome(Reason.ERROR, "rank 1", error=error, iteration=24, saved=9))
    assert (twice.action, twice.exit_code, twice.exclude) == (Action.STOP, 93, nodes)
    stuck = after(sick, AttemptOutcome(Reason.HANG, "no step", saved=9), limit=1)
    assert (stuck.action, stuck.exit_code, stuck.exclude) == (Action.STOP, 93, nodes)


def test_a_newer_checkpoint_begins_the_count_anew():
    earlier = [ended(number, Reason.LOST_PEER, saved=10) for number in range(1, 4)]
    assert after(earlier, AttemptOutcome(Reason.LOST_PEER, "again", saved=20)).action is Action.REQUEUE
    earlier.append(ended(4, Reason.LOST_PEER, saved=20))
    assert after(earlier, AttemptOutcome(Reason.LOST_PEER, "again", saved=20)).action is Action.REQUEUE


def test_preemptions_are_not_counted():
    earlier = [ended(number, Reason.PREEMPTED, gained=0) for number in range(1, 50)]
    assert after(earlier, AttemptOutcome(Reason.PREEMPTED, "again")).action is Action.REQUEUE


def test_a_time_limit_too_short_for_a_step_stops():
    earlier = [ended(number, Reason.OUT_OF_TIME, gained=0) for number in range(1, 4)]
    assert after(earlier, AttemptOutcome(Reason.OUT_OF_TIME, "again", gained=0)).action is Action.STOP
    assert after(earlier, AttemptOutcome(Reason.OUT_OF_TIME, "again", gained=3)).action is Action.REQUEUE


def test_a_node_is_avoided_after_its_second_failure():
    first = ended(1, Reason.LOST_PEER, nodes=["n1"], saved=1)
    assert after([], AttemptOutcome(Reason.LOST_NODE, "down", ("n1",))).exclude == ()
    assert after([first], AttemptOutcome(Reason.LOST_NODE, "down", ("n2",), saved=2)).exclude == ()
    assert after([first], AttemptOutcome(Reason.HANG, "stuck", ("n1",), saved=2)).exclude == ("n1",)


def test_an_unhealthy_node_is_avoided_at_once():
    assert after([], AttemptOutcome(Reason.UNHEALTHY_NODE, "ECC", ("n3",))).exclude == ("n3",)
    assert excluded_nodes([ended(1, Reason.UNHEALTHY_NODE, nodes=["n3"])]) == ("n3",)


def test_attempts_that_blame_nobody_hide_no_failure():
    failures = [ended(number, Reason.LOST_NODE, nodes=["n1"]) for number in (2, 5)]
    others = [ended(1, None), ended(3, Reason.PREEMPTED), ended(4, Reason.ERROR)]
    assert excluded_nodes([others[0], failures[0], *others[1:], failures[1]]) == ("n1",)


def test_the_same_error_at_the_same_iteration_twice():
    error = "ValueError at step.py:59"
    first = ended(1, Reason.ERROR, error=error, iteration=24, saved=20)
    again = AttemptOutcome(Reason.ERROR, "rank 1: ValueError", error=error, iteration=24, saved=20)
    assert after([], again).action is Action.REQUEUE
    assert after([first], again).action is Action.STOP
    assert "twice" in after([first], again).why
    later = AttemptOutcome(Reason.ERROR, "rank 1: ValueError", error=error, iteration=31, saved=30)
    assert after([first], later).action is Action.REQUEUE, "it came further"
    other = AttemptOutcome(Reason.ERROR, "rank 1", error="OSError at data.py:1", iteration=24, saved=20)
    assert after([first], other).action is Action.REQUEUE
    between = [first, ended(2, Reason.PREEMPTED, saved=20)]
    assert after(between, again).action is Action.STOP, "a preemption in between changes nothing"


def test_attempts_without_an_end_count(tmp_path):
    log = AttemptLog(tmp_path / "attempts.jsonl")
    for _ in range(4):
        log.begin(nodes=["n1"])
    earlier = log.read()
    assert [attempt.ended for attempt in earlier] == [None] * 4
    assert after(earlier, AttemptOutcome(Reason.LOST_PEER, "again")).action is Action.STOP


def test_what_a_person_forgave_is_forgotten(tmp_path):
    log = AttemptLog(tmp_path / "attempts.jsonl")
    for _ in range(3):
        number = log.begin(nodes=["n1"])
        log.end(number, reason=str(Reason.LOST_PEER), failed_nodes=["n1"], saved_iteration=0)
    assert excluded_nodes(log.since_forgiven()) == ("n1",)
    log.forgive()
    assert log.since_forgiven() == []
    assert log.newest() == 3
    assert len(log.read()) == 3


def test_lines_that_were_cut_off_are_passed_over(tmp_path):
    log = AttemptLog(tmp_path / "attempts.jsonl")
    number = log.begin(nodes=["n1"])
    with log.path.open("a") as file:
        file.write('{"attempt": 1, "ended": "20')
    log.end(number, reason="finished", exit_code=0)
    assert log.begin(nodes=["n2"]) == 2
    first, second = log.read()
    assert (first.reason, first.exit_code) == ("finished", 0)
    assert second.nodes == ("n2",)
