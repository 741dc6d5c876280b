"""Why an attempt ended, from what is left of it."""

import errno
import os
import signal

import pytest

from megatron_qwen.errors import SilentCorruptionError
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.ranks import TaskEnd
from megatron_qwen.job.verdict import AttemptVerdict, Evidence, judge
from megatron_qwen.resilience.rank_end import RankEnd, rank_end, read_rank_ends
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.resilience.straggler_leave import SlowNodes

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


def test_ranks_that_leave_a_slow_node():
    left = {"tasks": [TaskEnd(0, "n1", 75)], "ends": [end(0, 75)], "slow": SlowNodes(("n2",), "rank 3 on n2 is slow")}
    assert judge(Evidence(75, nodes=NODES, **left)) == AttemptVerdict(Reason.STRAGGLER, "rank 3 on n2 is slow", ("n2",))
    # A request of the scheduler that came at the same time is its own reason; no error is hidden.
    assert reason(75, **left, ending=Ending.PREEMPTING) is Reason.PREEMPTED
    assert reason(75, **left, ending=Ending.CANCELLED) is Reason.CANCELLED
    assert reason(1, **{**left, "ends": [end(1, 1, error="RuntimeError")]}) is Reason.ERROR
    assert reason(76, tasks=[TaskEnd(2, "n2", -9)], slow=left["slow"]) is Reason.LOST_PEER


def test_a_node_that_is_down_outweighs_a_clean_end():
    verdict = judge(Evidence(75, [TaskEnd(0, "n1", 75)], [end(0, 75)], NODES, down_nodes=("n2",)))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_NODE, ("n2",))


def test_a_full_disk_is_the_cause_of_what_ranks_could_not_say():
    """They are killed when the first of them fails, and no record of theirs was written."""
    tasks = [TaskEnd(0, "n1", 143), TaskEnd(1, "n1", -signal.SIGTERM)]
    full = "No space left on device in /runs/a"
    verdict = judge(Evidence(143, tasks, [], NODES, storage=full))
    assert (verdict.reason, verdict.detail, verdict.failed_nodes) == (Reason.STORAGE, full, ())
    # What ranks read there is in doubt; what they computed, or were told, is not.
    for code, wanted in ((3, Reason.STORAGE), (4, Reason.STORAGE), (2, Reason.CONFIGURATION), (17, Reason.NUMERICS)):
        assert reason(code, ends=[end(0, code, error="UserError")], storage=full) is wanted
    assert reason(143, tasks=tasks, storage=full, ending=Ending.CANCELLED) is Reason.CANCELLED
    assert reason(143, tasks=tasks, storage=full, down_nodes=("n2",)) is Reason.LOST_NODE


def test_a_disk_that_was_full_for_a_moment():
    """It has room again when the controller looks; the rank that failed first has said why."""
    for place in ("/runs/a/metrics.jsonl", None):
        said = rank_end(2, exit_code=1, error=OSError(28, "No space left on device", place))
        verdict = of_rank_2(said)
        assert verdict.reason is Reason.STORAGE
        assert "rank 2 on n2: OSError: [Errno 28] No space left on device" in verdict.detail
        assert verdict.error is None, "the same error twice would stop the run"


def of_rank_2(said: RankEnd) -> AttemptVerdict:
    """Of a run in /runs/a whose rank 2 failed first."""
    ends = [end(0, 76, error="RuntimeError", time=9e9), said]
    return judge(Evidence(1, [TaskEnd(2, "n2", 1)], ends, NODES, directory="/runs/a"))


@pytest.mark.parametrize(
    ("code", "number", "place"),
    [
        (1, errno.ENOSPC, "/dev/shm/nccl-1"),  # a file system of the node
        (1, errno.EIO, "/tmp/cache"),
        (4, errno.ESTALE, "/runs/a/checkpoints/iter_10/0.distcp"),  # the node's way to the run's
        (3, errno.EIO, "/data/corpus.bin"),
    ],
)
def test_a_node_whose_file_systems_fail_is_to_blame(code, number, place):
    """The controller writes to the run's directory without a fault."""
    verdict = of_rank_2(rank_end(2, exit_code=code, error=OSError(number, os.strerror(number), place)))
    assert (verdict.reason, verdict.failed_nodes) == (Reason.LOST_PEER, ("n2",))


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


def test_a_rank_that_ends_itself_without_a_record():
    """By os._exit, or a library's exit: its peers lost a connection, and its node has nothing to do with it."""
    ends = [end(rank, 76, error="RuntimeError") for rank in (0, 1, 3)]
    tasks = [TaskEnd(0, "n1", 76), TaskEnd(2, "n2", 13), TaskEnd(3, "n2", 76)]
    verdict = judge(Evidence(76, tasks, ends, NODES))
    assert (verdict.reason, verdict.failed_nodes, verdict.error) == (Reason.ERROR, (), "exit 13")
    assert verdict.detail == "rank 2 on n2 exited with code 13 and said nothing"
    for code in (75, 76, 143):
        tasks[1] = TaskEnd(2, "n2", code)
        assert judge(Evidence(76, tasks, ends, NODES)).reason is not Reason.ERROR


def corruption(rank: int, *suspects: int) -> RankEnd:
    """The end of a rank as exits.py reports it."""
    return rank_end(rank, exit_code=76, error=SilentCorruptionError("weights changed", suspects=suspects))


def test_silent_corruption_blames_the_nodes_of_the_ranks_that_it_points_to():
    tasks = [TaskEnd(rank, node, 76) for rank, node in NODES.items()]
    ends = [corruption(rank, 2) for rank in NODES]
    verdict = judge(Evidence(76, tasks, ends, NODES, down_nodes=("n1",)))
    assert verdict == AttemptVerdict(Reason.CORRUPTION, "SilentCorruptionError: weights changed", ("n2",))
    assert judge(Evidence(76, tasks, [corruption(0)], NODES)).failed_nodes == ()


def test_silent_corruption_on_most_ranks_or_nodes_blames_none():
    """Two replicas that differ do not say which of them is wrong."""
    tasks = [TaskEnd(rank, node, 76) for rank, node in NODES.items()]
    assert judge(Evidence(76, tasks, [corruption(0, 1, 3)], NODES)).failed_nodes == (), "both nodes"
    assert judge(Evidence(76, tasks, [corruption(0, 0, 1, 2)], NODES)).failed_nodes == (), "three of four ranks"
    assert judge(Evidence(76, tasks, [corruption(0, 2, 3)], NODES)).failed_nodes == ("n2",)
    wide = {rank: f"n{rank // 2}" for rank in range(8)}
    assert judge(Evidence(76, tasks, [corruption(0, 1, 7)], wide)).failed_nodes == ("n0", "n3")
    assert judge(Evidence(76, tasks, [corruption(0, 1, 3, 7)], wide)).failed_nodes == (), "three of four nodes"
    one = dict.fromkeys(range(4), "n1")
    assert judge(Evidence(76, tasks, [corruption(0, 1)], one)).failed_nodes == ("n1",)


def test_the_record_of_a_rank_keeps_its_suspects(tmp_path):
    rank_end(1, exit_code=76, error=SilentCorruptionError("x", suspects=[3, 5])).write(tmp_path)
    rank_end(2, exit_code=1, error=ValueError("x")).write(tmp_path)
    assert {end.rank: end.suspects for end in read_rank_ends(tmp_path)} == {1: (3, 5), 2: None}
