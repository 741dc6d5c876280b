"""The table of runs, and their logs, from files that runs leave."""

import datetime
import io
import json
import os
import resource
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from launch import logs, status
from launch.logs import follow, merged, show
from launch.run_jobs import Submission
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.render import to_yaml
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import QueuedJob
from tests.conftest import command, environment
from tests.processes.other_user import NOBODY


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
    assert found.saving is None


def test_what_the_interval_of_checkpoints_loses(tmp_path):
    run = make_run(tmp_path, "a")
    run.performance.write_text(json.dumps({"saving": {"iterations": 100, "best": 483}}))
    (told,) = json.loads(status.as_json([row(run, job())]))
    assert told["saving"] == {"iterations": 100, "best": 483}


def test_a_run_that_waits_for_a_slow_rank(tmp_path):
    run = make_run(tmp_path, "a")
    slow = {"rank": 5, "node": "n3", "score": 0.48, "cause": "compute"}
    run.metrics.write_text(json.dumps({"iteration": 41, "step_time_s": 0.5, "stragglers": [slow]}) + "\n")
    found = row(run, job())
    assert found.stragglers == (slow,)
    assert json.loads(status.as_json([found]))[0]["stragglers"] == [slow]
    table = status.table([found])
    assert table.endswith("a waits for slow ranks: rank 5 on n3 (0.48 of its peers' speed, compute)")
    run.write_status(RunState.STOPPED)
    assert row(run, {}).stragglers == ()


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
    (found,) = status.collect([run]).rows
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


def test_a_clock_that_is_set_back_takes_no_line_out_of_its_order(tmp_path):
    (tmp_path / "rank_0.log").write_text("2026-01-01 10:00:05 a\n2026-01-01 10:00:01 b\nc\n")
    (tmp_path / "rank_1.log").write_text("first\n2026-01-01 10:00:03 d\n2026-01-01 10:00:05 e")
    lines = list(merged({rank: tmp_path / f"rank_{rank}.log" for rank in (0, 1)}))
    assert [line[-1] for line in lines] == ["t", "d", "a", "b", "c", "e"]


def test_lines_of_several_zones_are_in_the_order_of_time(tmp_path):
    """Also those of earlier versions, which are local without an offset, some with milliseconds after a comma."""
    first = ["2026-01-01 10:00:00.500+00:00 b", "2026-01-01 10:00:03.000Z e", "2026-13-01 10:00:03 none: stays here f"]
    (tmp_path / "rank_0.log").write_text("\n".join(first))
    (tmp_path / "rank_1.log").write_text("2026-01-01 02:00:00.499-08:00 a\n2026-01-01 15:30:02.000+05:30 d\n")
    old = datetime.datetime.fromisoformat("2026-01-01T10:00:01+00:00").astimezone().strftime("%Y-%m-%d %H:%M:%S")
    (tmp_path / "rank_2.log").write_text(f"{old},250 c\n{old} c\n")
    lines = list(merged({rank: tmp_path / f"rank_{rank}.log" for rank in (0, 1, 2)}))
    assert [line[-1] for line in lines] == ["a", "b", "c", "c", "d", "e", "f"]


def test_more_logs_than_files_may_be_open(tmp_path):
    """The memory does not grow with the logs: one line of each is held."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    line = f"2026-01-01 10:00:00 {'x' * 1000}\n"
    for rank in range(40):
        (tmp_path / f"rank_{rank}.log").write_text(line * 1000)
    tracemalloc.start()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 48), before[1]))
        count = sum(1 for _ in merged({rank: tmp_path / f"rank_{rank}.log" for rank in range(40)}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert count == 40_000
    assert peak < 4 << 20, "of 40 MB"


def test_a_log_is_followed_piece_by_piece(tmp_path, monkeypatch):
    """Of a log that is larger than memory only a piece is held; a line longer than that is cut, and nothing is lost."""
    monkeypatch.setattr(logs, "_PIECE", 16)
    run = make_run(tmp_path, "logs", RunState.DONE)
    run.logs(1).mkdir(parents=True)
    lines = ["first", "second", "", "x" * 40, "last line"]
    (run.logs(1) / "rank_3.log").write_text("\n".join(lines) + "\nhalf")
    out = io.StringIO()
    follow(run, ranks=[3], out=out)
    assert out.getvalue().splitlines() == [
        "==> attempt 1", "first", "second", "", "x" * 16, "x" * 16, "x" * 8, "last line"
    ]  # fmt: skip
    sizes = [len(text) for text, _ in logs._added(run.logs(1) / "rank_3.log", 0)]
    assert max(sizes) <= 16


def test_ranks_that_have_no_log(tmp_path):
    run = write_logs(tmp_path)
    with pytest.raises(ConfigError) as raised:
        show(run, ranks=[0, 7, 9], attempt=None, out=io.StringIO())
    assert [str(problem) for problem in raised.value.problems] == [
        f"--rank = {rank}: has no log here; logs exist of ranks 0 to 1." for rank in (7, 9)
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_sees_what_the_owner_has_opened():
    def status_for(user, *more):
        words = command("tests.processes.other_user", user, "launch.command", *more, run.path)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    # pytest closes its own directory to other users.
    with tempfile.TemporaryDirectory(prefix="mq_runs_") as place:
        Path(place).chmod(0o755)
        run = make_run(Path(place), "private")
        run.path.chmod(0o700)
        for action in ("status", "logs", "cancel", "requeue"):
            code, said = status_for(NOBODY, action)
            assert code == 2, said
            assert "may not be read by you; root can open it to a group: chmod g+rX" in said
        run.path.chmod(0o755)
        code, said = status_for(NOBODY, "status")
        assert code == 0, said
        assert run.path.name in said
