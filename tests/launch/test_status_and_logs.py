"""The table of runs, and their logs, from files that runs leave."""

import io
import json

import pytest

from launch import status
from launch.logs import merged, show
from launch.run_jobs import Submission
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.render import to_yaml
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import QueuedJob


def make_run(root, name, state=RunState.RUNNING, **facts) -> RunDirectory:
    run = RunDirectory(root / name)
    run.path.mkdir(parents=True)
    run.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]().with_section("training", train_iters=100)))
    run.write_status(state, **facts)
    record = {"iteration": 40, "lm_loss": 3.25, "tokens_per_second": 1000.0, "step_time_s": 0.5}
    run.metrics.write_text(json.dumps({**record, "iteration": 39}) + "\n" + json.dumps(record) + "\n" + '{"iter')
    AttemptLog(run.attempts).begin()
    run.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    return run


def job(state="RUNNING", reason="None", priority="100") -> dict[str, QueuedJob]:
    return {"7": QueuedJob("7", state, reason, "1:00", "9:00", "n[1-2]", "now", "run", priority)}


def row(run, queue, kept=None) -> status.RunStatus:
    newest = Submission(("7",), "slurm", "cpu", 1)
    return status._status(run, newest, queue, kept or {}, asked=True)


def test_a_run_that_runs(tmp_path):
    found = row(make_run(tmp_path, "a"), job())
    assert (found.state, found.iteration, found.train_iters, found.loss) == ("running", 40, 100, 3.25)
    assert found.seconds_left == 30.0
    assert (found.jobs, found.nodes, found.attempts) == (("7",), "n[1-2]", 1)


@pytest.mark.parametrize(
    ("state", "queue", "kept", "expected", "advice"),
    [
        (RunState.QUEUED, job("PENDING", "Resources"), {}, "queued", ""),
        (RunState.REQUEUED, job("PENDING", "BeginTime"), {}, "requeued", ""),
        (RunState.QUEUED, job("PENDING", "launch failed requeued held", "0"), {}, "held", "scontrol release 7"),
        (RunState.RUNNING, job("PENDING", "JobHeldUser", "0"), {}, "held", "scontrol release 7"),
        (RunState.RUNNING, {}, {}, "lost", "mq launch requeue"),
        (RunState.RUNNING, {}, {"7": "NODE_FAIL"}, "lost", "mq launch requeue"),
        (RunState.STOPPED, {}, {}, "stopped", "mq launch requeue"),
        (RunState.DONE, {}, {}, "done", ""),
        (RunState.CANCELLED, {}, {}, "cancelled", ""),
    ],
)
def test_states(tmp_path, state, queue, kept, expected, advice):
    found = row(make_run(tmp_path, "a", state), queue, kept)
    assert found.state == expected
    assert advice in found.advice
    assert bool(found.advice) is bool(advice)
    if kept:
        assert "NODE_FAIL" in found.reason


def test_what_cannot_be_read_is_left_open(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.path.mkdir()
    run.run_yaml.write_text("x")
    run.status.write_text("{")
    (found,) = status.collect([run])
    assert (found.state, found.iteration, found.loss) == ("unknown", None, None)
    assert "unknown" in status.table([found])


def test_a_directory_of_runs(tmp_path):
    for name in ("b", "a"):
        make_run(tmp_path, name, RunState.DONE)
    (tmp_path / "no_run").mkdir()
    assert [run.path.name for run in status.find_runs([tmp_path])] == ["a", "b"]


def write_logs(tmp_path) -> RunDirectory:
    run = make_run(tmp_path, "logs")
    for attempt, rank, lines in (
        (1, 0, ["2026-01-01 10:00:00 joined", "2026-01-01 10:00:05 step", "Traceback:", "  line 3"]),
        (1, 1, ["2026-01-01 10:00:02 joined"]),
        (2, 0, ["2026-01-01 11:00:00 joined again"]),
    ):
        path = run.logs(attempt) / f"rank_{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return run


def test_merged_logs_keep_tracebacks_together(tmp_path):
    run = write_logs(tmp_path)
    lines = list(merged({rank: run.logs(1) / f"rank_{rank}.log" for rank in (0, 1)}))
    assert [line.partition("] ")[2] for line in lines] == [
        "2026-01-01 10:00:00 joined",
        "2026-01-01 10:00:02 joined",
        "2026-01-01 10:00:05 step",
        "Traceback:",
        "  line 3",
    ]
    assert [line[:3] for line in lines] == ["[0]", "[1]", "[0]", "[0]", "[0]"]


def test_logs_across_attempts(tmp_path):
    run = write_logs(tmp_path)
    out = io.StringIO()
    show(run, ranks=[0], attempt=None, out=out)
    assert out.getvalue().index("==> attempt 1") < out.getvalue().index("==> attempt 2")
    assert "joined again" in out.getvalue()
    with pytest.raises(ValueError, match="has no logs here; logs exist of: 1, 2"):
        show(run, ranks=None, attempt=5, out=out)
