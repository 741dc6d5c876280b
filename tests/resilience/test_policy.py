"""The requeue policy: every row of the table, and the rules that read it."""

import pytest

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.resilience.policy import AttemptOutcome, backoff_s, decide, decide_unbegun, excluded_nodes
from megatron_qwen.resilience.rules import POLICY, RULES, Action, Counted, Reason


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


@pytest.mark.parametrize("reason", [rule.reason for rule in POLICY if rule.counted is Counted.ALWAYS])
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


def begun_at(number: int, began: int, *, saved: int = 0) -> Attempt:
    """An attempt that added five iterations and lost a rank."""
    return ended(number, Reason.LOST_PEER, saved=saved, gained=5, iteration=began + 5)


def test_restarts_that_begin_further_do_not_count():
    """From local checkpoints: each begins where the one before had come to, and nothing is committed."""
    earlier = [begun_at(number, 5 * (number - 1)) for number in range(1, 14)]
    at_65 = AttemptOutcome(Reason.LOST_PEER, "again", iteration=70, gained=5)
    assert after(earlier, at_65, limit=1).action is Action.STOP, "not for ever: this is the thirteenth"
    assert after(earlier[:-1], AttemptOutcome(Reason.LOST_PEER, "again", iteration=65, gained=5), limit=1).action is (
        Action.REQUEUE
    )
    assert after(earlier, at_65, limit=2).action is Action.REQUEUE
    earlier[6] = begun_at(7, 30, saved=20)
    assert after(earlier, at_65, limit=1).action is Action.REQUEUE, "a committed one begins the count anew"


def test_restarts_that_begin_where_others_began_count():
    earlier = [begun_at(1, 0), begun_at(2, 4), begun_at(3, 4)]
    again = AttemptOutcome(Reason.LOST_PEER, "again", iteration=9, gained=5)
    assert after(earlier, again, limit=3).action is Action.REQUEUE
    assert after(earlier, again, limit=2).action is Action.STOP
    # From the committed checkpoint, which was counted as progress already.
    earlier = [begun_at(1, 0, saved=4), begun_at(2, 4, saved=4)]
    assert after(earlier, AttemptOutcome(Reason.HANG, "again", iteration=9, gained=5, saved=4), limit=2).action is (
        Action.STOP
    )


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
    assert after([], AttemptOutcome(Reason.CORRUPTION, "weights changed", ("n1",))).exclude == ("n1",)
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


def test_attempts_that_could_not_write_wait_longer_each_time_and_end_in_a_stop():
    full = AttemptOutcome(Reason.STORAGE, "No space left on device in /runs/a")
    earlier, delays = [], []
    for number in range(1, 30):
        decision = after(earlier, full)
        if decision.action is Action.STOP:
            break
        delays.append(decision.delay_s)
        earlier.append(ended(number, Reason.STORAGE, gained=0))
    assert delays[:6] == [120, 240, 480, 960, 1800, 1800]
    assert (len(delays), decision.exit_code) == (24, 93)
    assert "25 attempts in a row could not write; the last one ended with: No space left on device" in decision.why


def test_a_checkpoint_or_another_end_begins_the_pauses_anew():
    full = AttemptOutcome(Reason.STORAGE, "full", saved=20)
    at_once = [ended(number, Reason.STORAGE, gained=0, saved=10) for number in (1, 2, 3)]
    assert after(at_once, AttemptOutcome(Reason.STORAGE, "full", saved=10)).delay_s == 960
    assert after(at_once, full).delay_s == 120
    assert after([*at_once, ended(4, Reason.STORAGE, saved=20)], full).delay_s == 240
    assert after([*at_once, ended(4, Reason.PREEMPTED, gained=0, saved=20)], full).delay_s == 120
    assert after(at_once, AttemptOutcome(Reason.LOST_PEER, "killed")).delay_s == 0


def test_a_checkpoint_that_never_fits_stops_the_run():
    """Each attempt makes the steps up to the save again, on all its GPUs."""
    earlier = [ended(1, Reason.STORAGE, gained=10, saved=40)]
    for number in range(2, 9):
        decision = after(earlier, AttemptOutcome(Reason.STORAGE, "the checkpoint needs 900 MiB", gained=10, saved=40))
        if decision.action is Action.STOP:
            break
        earlier.append(ended(number, Reason.STORAGE, gained=10, saved=40))
    assert len(earlier) == 3
    assert "3 restarts without a newer checkpoint" in decision.why


def test_attempts_that_could_not_begin():
    at_job, at_first, late = (decide_unbegun("full", tries=tries) for tries in (None, 1, 25))
    assert (at_job.action, at_job.delay_s) == (Action.REQUEUE, 600)
    assert (at_first.action, at_first.delay_s) == (Action.REQUEUE, 120)
    assert (late.action, late.exit_code) == (Action.STOP, 93)


def test_one_unhealthy_node_needs_no_pause_and_a_second_does():
    sick = AttemptOutcome(Reason.UNHEALTHY_NODE, "n1: ECC", failed_nodes=("n1",))
    assert after([], sick).delay_s == 0
    assert after([ended(1, Reason.UNHEALTHY_NODE, gained=0, nodes=("n2",))], sick).delay_s == 120


def test_pauses():
    assert [backoff_s(count) for count in (-1, 0, 1, 2, 7, 1000)] == [0, 0, 120, 240, 1800, 1800]
