"""Who is the odd one among the stacks of all ranks."""

import subprocess
import sys
import time

from megatron_qwen.job.stacks import _complete, compare
from tests.conftest import ROOT

DUMP = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait

Current thread 0x00007f02 (most recent call first):
  File "/venv/torch/distributed.py", line {line} in {name}
  File "/run/code/megatron_qwen/training/step.py", line 59 in train_step
  File "/run/code/megatron_qwen/train.py", line 41 in main
"""
NODES = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


def dump(line: int = 10, name: str = "all_reduce") -> str:
    return DUMP.format(line=line, name=name)


def test_a_rank_that_stands_elsewhere():
    found = compare({0: dump(), 1: dump(), 2: dump(99, "read"), 3: dump()}, NODES)
    assert found.odd == (2,)
    assert found.summary[0].startswith("3 of 4 ranks (rank 0 on n1, rank 1 on n1, rank 3 on n2) are at")
    assert "distributed.py:99 read < step.py:59 train_step" in found.summary[1]


def test_the_thread_that_watches_for_requests_is_not_where_a_rank_is():
    """faulthandler prints it before the main thread, and it was started from train.py."""
    watch = DUMP.replace("in main", "in <lambda>").format(line=54, name="last_collectives")
    assert not _complete(watch)
    found = compare({rank: watch.replace("Current thread", "Thread") + dump() for rank in NODES}, NODES)
    assert found.summary[0].startswith("4 of 4 ranks")
    assert "distributed.py:10 all_reduce" in found.summary[0]


def test_a_rank_without_a_stack():
    found = compare({0: dump(), 1: dump(), 3: dump()}, NODES)
    assert found.odd == (2,)
    assert "no stack from rank 2 on n2" in found.summary[-1]


def test_all_stand_at_one_place():
    assert compare({rank: dump() for rank in NODES}, NODES).odd == ()
    assert compare({}, NODES).odd == (0, 1, 2, 3)


def test_a_process_prints_its_stacks_on_sigquit(tmp_path):
    """Even while it holds the interpreter's lock."""
    script = tmp_path / "busy.py"
    script.write_text(
        "from megatron_qwen.resilience import stack_dump\nstack_dump.install()\nprint('on', flush=True)\n"
        "def held():\n    return 10 ** 10_000_000 % 7\nheld()\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "on\n"
    time.sleep(0.5)
    process.send_signal(3)
    time.sleep(0.5)
    assert process.poll() is None, "it lives on"
    process.kill()
    assert "in held" in process.communicate()[1]
