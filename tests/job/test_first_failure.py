"""What is known of a first failure, from what srun, ranks and counters say."""

import signal

import pytest

from megatron_qwen.job.first_failure import MEMORY_FOUND, first_failure, of_a_hang, words_of
from megatron_qwen.job.ranks import TaskEnd
from megatron_qwen.job.verdict import Evidence, judge
from megatron_qwen.resilience.evidence import FailureEvidence, Sign
from megatron_qwen.resilience.rank_end import RankEnd
from megatron_qwen.resilience.rules import Reason

NODES = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
KILLED = "srun: error: n2: task 2: Killed\n"


def end(rank: int, code: int, *, error: str = "RuntimeError", message: str = "so", **more) -> RankEnd:
    return RankEnd(rank, code, message, error, 0.0, **more)


def of(*, tasks=(), ends=(), said="", found=None, nodes=NODES, **more) -> FailureEvidence | None:
    evidence = Evidence(1, tasks, ends, nodes, **more)
    return first_failure(evidence, judge(evidence), said=said, seconds=12.0, found=found or {})


def killed(rank: int = 2, code: int = -signal.SIGKILL) -> TaskEnd:
    return TaskEnd(rank, NODES[rank], code)


def test_a_killed_rank():
    told = [end(0, 76), end(1, 76), end(3, 76)]
    found = of(tasks=[killed()], ends=told, said=KILLED)
    assert found == FailureEvidence(Sign.KILLED, 2, "n2", "SIGKILL", seconds=12.0)
    crashed = of(tasks=[killed(code=-signal.SIGSEGV)], ends=told)
    assert crashed is not None
    assert (crashed.sign, crashed.signal) == (Sign.KILLED, "SIGSEGV")


@pytest.mark.parametrize(
    "said",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.1. Some of the step tasks have been OOM Killed.\n",
        "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=7.1 cgroup.\n",
        "srun: error: n2: task 2: Out Of Memory\n",
    ],
)
def test_memory_that_ran_out_as_slurm_says_it(said):
    found = of(tasks=[killed()], ends=[end(0, 76)], said=KILLED + said)
    assert found is not None
    assert (found.sign, found.rank, found.node) == (Sign.MEMORY, 2, "n2")
    other = of(tasks=[killed(code=-signal.SIGSEGV)], ends=[end(0, 76)], said=said)
    assert other is not None
    assert other.sign is Sign.KILLED


def test_memory_that_ran_out_as_the_node_counts_it():
    line = f"{MEMORY_FOUND} in the job's cgroup"
    here = of(tasks=[killed()], said=KILLED, found={"n2": [line]})
    there = of(tasks=[killed()], said=KILLED, found={"n1": [line]})
    assert here is not None
    assert there is not None
    assert (here.sign, here.found) == (Sign.MEMORY, (line,))
    assert (there.sign, there.found) == (Sign.KILLED, ())


def test_a_device_that_counted_errors():
    found = of(tasks=[killed()], said=KILLED, found={"n2": ["Xid 79"]})
    assert found is not None
    assert (found.sign, found.node, found.found) == (Sign.HARDWARE, "n2", ("Xid 79",))
    link = of(tasks=[killed()], said=KILLED, found={"n2": ["mlx5_0/1_link_downed +1"]})
    assert link is not None
    assert link.sign is Sign.KILLED, "a link that was down kills no process"
    error = of(tasks=[TaskEnd(3, "n2", 1)], ends=[end(3, 1, error="RuntimeError at a.py:1")], found={"n2": ["Xid 48"]})
    assert error is not None
    assert (error.sign, error.rank) == (Sign.HARDWARE, 3)
    told = of(tasks=[TaskEnd(3, "n2", 1)], ends=[end(3, 1, message="uncorrectable ECC", hardware=True)])
    assert told is not None
    assert (told.sign, told.rank, told.exit_code) == (Sign.HARDWARE, 3, 1)


def test_all_ranks_of_a_node_at_one_stroke():
    """The lowest of them is no more at fault than the others."""
    at_once = of(tasks=[killed(2), killed(3)], ends=[end(0, 76)], said="srun: error: n2: tasks 2-3: Killed\n")
    assert at_once is not None
    assert (at_once.rank, at_once.node) == (None, "n2")
    one_by_one = of(
        tasks=[killed(2), killed(3)],
        ends=[end(0, 76)],
        said="srun: error: n2: task 2: Killed\nsrun: error: n2: task 3: Killed\n",
    )
    assert one_by_one is not None
    assert one_by_one.rank == 2


def test_a_lost_connection():
    plain = of(tasks=[TaskEnd(0, "n1", 76)], ends=[end(0, 76), end(2, 76), end(1, 76), end(3, 76)])
    assert plain == FailureEvidence(Sign.CONNECTION, 0, "n1", exit_code=76, seconds=12.0)
    nccl = "NCCL error: Connection closed by remote peer n2<45678>"
    named = of(tasks=[TaskEnd(0, "n1", 76)], ends=[end(0, 76, message=nccl), end(2, 76)])
    assert named is not None
    assert named.ends == ("n1", "n2")
    stranger = of(tasks=[TaskEnd(0, "n1", 76)], ends=[end(0, 76, message="remote peer x9<1>"), end(2, 76)])
    assert stranger is not None
    assert stranger.ends == ()


def test_a_lost_connection_and_what_the_nodes_counted():
    lost = {"tasks": [TaskEnd(0, "n1", 76)], "ends": [end(0, 76), end(1, 76), end(2, 76), end(3, 76)]}
    link = of(**lost, found={"n2": ["mlx5_0/1_link_downed +1"]})
    assert link is not None
    assert (link.sign, link.ends, link.found) == (Sign.CONNECTION, ("n2",), ("n2: mlx5_0/1_link_downed +1",))
    both = of(**lost, found={node: ["mlx5_0/1_link_downed +1"] for node in ("n1", "n2")})
    assert both is not None
    assert both.ends == ()
    device = of(**lost, found={"n2": ["Xid 79"], "n1": [f"{MEMORY_FOUND} in the kernel log"]})
    assert device is not None
    assert (device.sign, device.node) == (Sign.HARDWARE, "n2")


@pytest.mark.parametrize(
    ("odd", "nodes", "found", "blamed", "expected"),
    [
        ((2,), NODES, {}, True, FailureEvidence(Sign.HUNG, 2, "n2")),
        ((2, 3), NODES, {}, True, FailureEvidence(Sign.HUNG)),
        ((2,), NODES, {}, False, FailureEvidence(Sign.HUNG)),
        ((), NODES, {}, False, FailureEvidence(Sign.CONNECTION)),
        ((), {0: "n1", 1: "n1"}, {}, False, FailureEvidence(Sign.HUNG)),
        ((0,), NODES, {"n2": ["Xid 79"]}, True, FailureEvidence(Sign.HARDWARE, node="n2", found=("Xid 79",))),
    ],
)
def test_a_hang(odd, nodes, found, blamed, expected):
    assert of_a_hang(odd, nodes, found, blamed=blamed) == expected


def test_other_ends():
    assert of(down_nodes=("n2",)) == FailureEvidence(Sign.DOWN, node="n2", seconds=12.0)
    error = of(tasks=[TaskEnd(3, "n2", 1)], ends=[end(3, 1, error="ValueError at a.py:1")])
    assert error == FailureEvidence(Sign.ERROR, 3, "n2", exit_code=1, seconds=12.0)
    unheard = of(tasks=[TaskEnd(1, "n1", 5)])
    assert unheard == FailureEvidence(Sign.ERROR, 1, "n1", exit_code=5, seconds=12.0)
    stale = end(2, 1, error="OSError", message="[Errno 116] Stale file handle: '/data/x'")
    files = of(tasks=[TaskEnd(2, "n2", 1)], ends=[stale])
    assert files is not None
    assert (files.sign, files.rank, files.node) == (Sign.FILES, 2, "n2")
    assert of(storage="No space left on device") is None
    assert judge(Evidence(1, (), (), NODES, storage="full")).reason is Reason.STORAGE


def test_words_of_srun_and_of_the_rank(tmp_path):
    evidence = Evidence(1, [killed()], (), NODES)
    assert words_of(tmp_path, evidence).strip() == ""
    (tmp_path / "srun.log").write_text(KILLED)
    (tmp_path / "rank_2.log").write_bytes(b"old " * 9999 + b"slurmstepd: error: Detected 1 oom_kill event\xff")
    said = words_of(tmp_path, evidence)
    assert KILLED in said
    assert "Detected 1 oom_kill event" in said
    assert len(said) < 2200
