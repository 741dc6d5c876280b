"""Ranks print their stacks because a file says so: all of a node, and also while one holds the interpreter's lock."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qwen.resilience import dump_watch
from tests.conftest import ROOT

RANK = """
import sys, time
from pathlib import Path
from megatron_qwen.resilience import dump_watch, stack_dump
stack_dump.install()
dump_watch._SHORTEST_TURN_S = 0.2
rank, logs = int(sys.argv[1]), Path(sys.argv[2])
watch = dump_watch.DumpWatch(
    logs, local_rank=rank, local_size=3, nodes=1, record=(logs / f"told_{rank}").touch
)
watch.start()
print("on", flush=True)
def holds_the_lock():
    return 10 ** 30_000_000 % 7
def waits():
    time.sleep(60)
holds_the_lock() if rank == 0 else waits()
"""


@pytest.fixture
def logs(tmp_path) -> Path:
    dump_watch.request_file(tmp_path).touch()
    return tmp_path


@pytest.fixture
def ranks(logs):
    """Three ranks of a node: the first holds the interpreter's lock, so that its own watch cannot run."""
    script = logs / "rank.py"
    script.write_text(RANK)
    processes = []
    for rank in range(3):
        with (logs / f"rank_{rank}.log").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, script, str(rank), str(logs)],
                    env={"PYTHONPATH": str(ROOT)},
                    stdout=output,
                    stderr=output,
                )
            )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def wait(ready, what: str) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def said(logs: Path, rank: int) -> str:
    return (logs / f"rank_{rank}.log").read_text()


def test_every_rank_of_a_node_prints_its_stacks(logs, ranks):
    wait(lambda: all("on" in said(logs, rank) for rank in range(3)), "the start")
    time.sleep(0.5)
    assert "most recent call first" not in "".join(said(logs, rank) for rank in range(3)), "nobody has asked"
    dump_watch.ask(logs)
    wait(lambda: "in holds_the_lock" in said(logs, 0), said(logs, 0))
    for rank in (1, 2):
        wait(lambda rank=rank: "in waits" in said(logs, rank), said(logs, rank))
        wait((logs / f"told_{rank}").exists, "the rank is told, and writes what else it knows")
    assert all(process.poll() is None for process in ranks), "they live on"


def test_a_process_of_another_job_is_left_alone(logs):
    """Two jobs on one node, of which one is asked."""
    heard = []
    watches = [
        dump_watch.DumpWatch(
            logs, local_rank=0, local_size=1, nodes=1, record=lambda: heard.append(1), environ={"SLURM_JOB_ID": job}
        )
        for job in ("7", "8")
    ]
    assert watches[0]._address(0) != watches[1]._address(0)
    assert dump_watch._listening(watches[0]._address(0)) == os.getpid()
    for watch in watches:
        watch.stop()
    assert dump_watch._listening(watches[0]._address(0)) is None


def test_ranks_take_turns(logs, monkeypatch):
    """In any span of eight turns each of eight ranks looks once."""
    watches = [dump_watch.DumpWatch(logs, local_rank=rank, local_size=8, nodes=1) for rank in range(8)]
    monkeypatch.setattr(dump_watch.time, "time", lambda: 1000.3)
    moments = sorted(watch._next_turn() for watch in watches)
    assert [round(later - earlier, 6) for earlier, later in itertools.pairwise(moments)] == [2.0] * 7
    assert min(moments) > 1000.3
    assert max(moments) <= 1016.3
    for watch in watches:
        watch.stop()


def test_looks_of_a_large_job_are_rare():
    assert dump_watch.turn_s(1) == 2.0
    assert 1250 / dump_watch.turn_s(1250) == pytest.approx(100)


def test_a_file_that_is_gone_is_no_request(tmp_path):
    watch = dump_watch.DumpWatch(tmp_path / "none", local_rank=0, local_size=1, nodes=1)
    assert watch._length() == 0
    watch.stop()


def test_the_signal_is_the_one_that_prints():
    assert dump_watch.DUMP_SIGNAL == signal.SIGQUIT
