"""Why an attempt ended, from what is left of it."""

import signal

import pytest

from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.ranks import TaskEnd
from megatron_qwen.job.verdict import Evidence, judge
from megatron_qwen.resilience.policy import Reason
from megatron_qwen.resilience.rank_end import RankEnd, rank_end

NODES = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


def end(rank: int, code: int, *, error: str = "", time: float = 0.0) -> RankEnd:
    return RankEnd(rank, code, f"rank {rank} says", error, time)


def reason(code: int, *, tasks=(), ends=(), **more) -> Reason:
    return judge(Evidence(code, tasks, ends, NODES, **more)).reason


def test_all_is_well():
    assert reason(0) is Reason.FINISHED


@pytest.mark.parametrize(
    ("code", "expected"), [(2, Reason.CONFIGURATION), (3, Reason.DATA), (4, Reason.CHECKPOINT), (17, Reason.NUMERICS)]
)
def test_codes_that_stop(code, expected):
    ends = [end(0, 76, error="RuntimeError"), end(3, code, error="UserError")]
    verdict = judge(Evidence(code, [TaskEnd(0, "n1", 76)], ends, NODES))
    assert verdict.reason is expected
    assert verdict.detail == "rank 3 on n2: rank 3 says"


def test_saved_and_left():
    left = {"tasks": [TaskEnd(0, "n1", 75)], "ends": [end(0, 75)], "signal_delay_s": 60.0}
    assert reason(75, **left, seconds_left=5000.0) is Reason.PREEMPTED
    assert reason(75, **left, seconds_left=100.0) is Reason.OUT_OF_TIME
    assert reason(75, **left, seconds_left=5000.0, ending=Ending.REQUEUED) is Reason.REQUEUED
    assert reason(75, **left, seconds_left=100.0, ending=Ending.PREEMPTING) is Reason.PREEMPTED
    assert reason(75, **left, ending=Ending.CANCELLED) is Reason.CANCELLED
    assert reason(75, **left, ending=Ending.TIMED_OUT) is Reason.OUT_OF_TIME


def test_a_node_that_is_down_outweighs_a_clean_end():
    verdict = judge(Evidence(75, [TaskEnd(0, "n1", 75)], [end(0, 75)], NODES, down_nodes=("n2",)))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_NODE, ("n2",))


def test_a_killed_rank_is_to_blame_and_not_those_that_lost_it():
    tasks = [TaskEnd(0, "n1", 76), TaskEnd(2, "n2", -signal.SIGKILL)]
    verdict = judge(Evidence(137, tasks, [end(0, 76, error="RuntimeError")], NODES))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_PEER, ("n2",))
    assert "SIGKILL" in verdict.detail


def test_ranks_that_only_lost_their_peers():
    ends = [end(0, 76, error="RuntimeError"), end(1, 76, error="RuntimeError")]
    verdict = judge(Evidence(76, [TaskEnd(0, "n1", 76)], ends, NODES))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_PEER, ("n2",))


def test_the_first_exception_counts():
    ends = [end(2, 1, error="ValueError at x.py:3", time=1.0), end(0, 76, error="RuntimeError at y.py:1", time=2.0)]
    verdict = judge(Evidence(76, [TaskEnd(2, "n2", 1)], ends, NODES))
    assert (verdict.reason, verdict.error) == (Reason.ERROR, "ValueError at x.py:3")


def test_ended_by_the_scheduler_before_it_had_saved():
    killed = [TaskEnd(rank, node, -signal.SIGKILL) for rank, node in NODES.items()]
    assert reason(137, tasks=killed, ending=Ending.TIMED_OUT) is Reason.OUT_OF_TIME
    assert reason(137, tasks=killed, ending=Ending.REQUEUED) is Reason.REQUEUED
    assert reason(137, tasks=killed, ending=Ending.NOTHING) is Reason.LOST_PEER


def test_ranks_told_to_end_before_they_could_save_are_no_error():
    """Twice the same would stop the run otherwise."""
    told = [TaskEnd(rank, node, -signal.SIGUSR2) for rank, node in NODES.items()]
    assert reason(140, tasks=told, seconds_left=5000.0) is Reason.PREEMPTED
    assert reason(140, tasks=told, seconds_left=30.0) is Reason.OUT_OF_TIME
    assert reason(140, tasks=told, ending=Ending.PREEMPTING) is Reason.PREEMPTED


def test_ranks_that_were_aborted_are_not_to_blame():
    tasks = [TaskEnd(0, "n1", -signal.SIGABRT), TaskEnd(2, "n2", -signal.SIGKILL)]
    verdict = judge(Evidence(137, tasks, [], NODES))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_PEER, ("n2",))
    alone = judge(Evidence(134, tasks[:1], [], NODES))
    assert (alone.reason, alone.failed_nodes) == (Reason.LOST_PEER, ())


def test_broken_hardware_is_the_nodes_fault_whatever_was_raised():
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    ends = [end(0, 76, error="RuntimeError"), rank_end(3, exit_code=1, error=error)]
    verdict = judge(Evidence(1, [TaskEnd(3, "n2", 1)], ends, NODES))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_PEER, ("n2",))


def test_srun_that_fails_without_a_word():
    verdict = judge(Evidence(1, [], [], NODES))
    assert (verdict.reason, verdict.error) == (Reason.ERROR, "srun 1")
