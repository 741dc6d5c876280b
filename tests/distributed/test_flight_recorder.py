"""What the recorder says of ranks of which some wait: over gloo, whose collectives torch records as NCCL's."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.distributed import flight_recorder
from megatron_qwen.job.collectives import read, summarise
from megatron_qwen.resilience.dump_watch import trace_file


def _late(logs: Path) -> list[dict[str, Any]]:
    """Rank 1 is late for the second collective of a group; both write what they know while rank 0 waits."""
    rank = dist.get_rank()
    group = dist.new_group([0, 1], group_desc="PAIR")
    dist.all_reduce(torch.ones(3), group=group)
    mark = logs / "written_by_0"
    if rank == 0:
        writer = threading.Thread(target=_write_soon, args=(logs, mark))
        writer.start()
        dist.all_reduce(torch.ones(5), group=group)
        writer.join()
    else:
        _wait_until(mark.exists)
        _wait_until(lambda: all(one["done"] for one in _collectives_of_the_pair()))
        flight_recorder.write(trace_file(logs, rank))
        dist.all_reduce(torch.ones(5), group=group)
    _wait_until(lambda: all(one["done"] for one in _collectives_of_the_pair()))  # noted after the call returns
    after = flight_recorder.last_collectives()
    dist.destroy_process_group(group)
    return after


def _write_soon(logs: Path, mark: Path) -> None:
    _wait_until(lambda: [one["done"] for one in _collectives_of_the_pair()] == [True, False])
    try:
        flight_recorder.write(trace_file(logs, 0))
    finally:
        mark.touch()


def _collectives_of_the_pair() -> list[dict[str, Any]]:
    return next((one["collectives"] for one in flight_recorder.last_collectives() if one["description"] == "PAIR"), [])


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_the_one_that_is_late(pool, tmp_path):
    ends = pool[2].run(_late, tmp_path)
    found = summarise(read(tmp_path, [0, 1]))
    assert found.behind == (1,)
    (line,) = found.lines
    assert line.endswith("(PAIR) of 2 ranks: rank 0 waits in gloo:all_reduce, number 2; rank 1 came no further than 1")
    for groups in ends:
        pair = next(one for one in groups if one["description"] == "PAIR")
        assert pair["ranks"] == [0, 1]
        assert [one["done"] for one in pair["collectives"]] == [True, True]
        assert pair["collectives"][1]["input_sizes"] == [[5]]


def _recorded_after_its_end() -> list[str]:
    group = dist.new_group([0, 1], group_desc="GONE")
    dist.all_reduce(torch.ones(3), group=group)
    dist.destroy_process_group(group)
    return [one["description"] for one in flight_recorder.last_collectives()]


def test_a_group_that_was_destroyed_is_not_told_of(pool):
    for told in pool[2].run(_recorded_after_its_end):
        assert "GONE" not in told


def test_what_a_user_has_set_stays(tmp_path):
    environ = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    flight_recorder.prepare(tmp_path, environ)
    assert environ == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "torch_trace_rank_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
