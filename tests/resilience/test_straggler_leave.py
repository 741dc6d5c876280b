"""When a run leaves a slow node, and what its controller learns."""

import datetime
import json

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.resilience.straggler_leave import SlowNodes, StragglerLeave, can_leave, read_slow_nodes
from megatron_qwen.resilience.stragglers import Straggler, WindowScores


def found(*nodes: str, cause: str = "compute") -> WindowScores:
    return WindowScores((), tuple(Straggler(rank, node, 0.5, 3, cause, 2.0, 1.0) for rank, node in enumerate(nodes)))


@pytest.fixture
def leave(tmp_path) -> StragglerLeave:
    return StragglerLeave(AttemptLog(tmp_path / "attempts.jsonl"), tmp_path / "logs" / "attempt_001")


def test_it_leaves_the_node_and_says_why(leave):
    assert leave.wanted(found("n3", "n3"), nodes=8)
    assert read_slow_nodes(leave.logs) == SlowNodes(("n3",), str(found("n3").stragglers[0]))


@pytest.mark.parametrize(
    ("scores", "nodes"),
    [(found(), 8), (found("n3", cause="data"), 8), (found("n1", "n2", "n3"), 5)],
    ids=["nobody is slow", "the storage is", "most nodes are"],
)
def test_it_stays(scores, nodes, leave):
    assert not leave.wanted(scores, nodes=nodes)
    assert read_slow_nodes(leave.logs) is None


@pytest.mark.parametrize(
    ("reason", "hours", "leaves"), [("straggler", 5, False), ("straggler", 7, True), ("hang", 1, True)]
)
def test_it_leaves_once_in_six_hours(reason, hours, leaves, leave):
    ended = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)
    lines = [{"attempt": 1, "started": ended.isoformat()}, {"attempt": 1, "ended": ended.isoformat(), "reason": reason}]
    leave.attempts.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert leave.wanted(found("n3"), nodes=8) is leaves


def test_a_refusal_is_told_once(leave, caplog):
    assert not leave.wanted(found("n1", "n2"), nodes=3)
    assert not leave.wanted(found("n1", "n2"), nodes=3)
    assert [record.getMessage() for record in caplog.records] == [
        "slow nodes are kept (n1, n2): they are more than half of the nodes"
    ]


def test_only_a_scheduler_has_other_nodes():
    assert can_leave({"SLURM_JOB_ID": "7"})
    assert not can_leave({})
