"""Waits for communication are counted, whoever calls them; nothing else changes."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_qwen.core_patches import timed_waits
from megatron_qwen.core_patches.timed_waits import RunQueueClock


def observe(prepared: bool) -> dict[str, Any]:
    """Whether kinds of calls move the clock, and what they return."""
    clock = timed_waits.clock()
    moved = {}

    def note(name: str, call: Any) -> Any:
        before = clock.waited_s if clock is not None else 0.0
        answer = call()
        moved[name] = clock is not None and clock.waited_s > before
        return answer

    numbers = torch.arange(3.0)
    note("all_reduce", lambda: dist.all_reduce(numbers))
    note("barrier", dist.barrier)
    note("objects", lambda: dist.all_gather_object([None], 1))
    handle = note("started", lambda: dist.all_reduce(numbers, async_op=True))
    waited = note("handle", handle.wait)
    note("nothing", lambda: time.sleep(0.001))
    return {"moved": moved, "waited": waited, "numbers": numbers.tolist(), "clock": clock is not None}


def test_every_wait_is_counted_and_nothing_else(observed):
    waits = {"all_reduce": True, "barrier": True, "objects": True, "started": False, "handle": True, "nothing": False}
    assert observed.prepared == {"moved": waits, "waited": True, "numbers": [0.0, 1.0, 2.0], "clock": True}


def test_without_the_patch_there_is_no_clock(observed):
    assert not observed.plain["clock"]
    assert (observed.plain["waited"], observed.plain["numbers"]) == (True, [0.0, 1.0, 2.0])


def test_a_queue_is_waited_in_where_a_core_is_shared():
    """Two busy processes on one core: each waits about as long as it runs."""
    cores = os.sched_getaffinity(0)
    queue = RunQueueClock()
    if not queue.is_there:
        pytest.skip("this kernel counts no waits for a core (/proc/thread-self/schedstat)")
    child = 0
    try:
        os.sched_setaffinity(0, {min(cores)})
        child = os.fork()
        if child == 0:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                pass
            os._exit(0)
        before, worked = queue.seconds(), time.thread_time()
        while time.thread_time() - worked < 0.2:
            pass
        waited = queue.seconds() - before
    finally:
        os.sched_setaffinity(0, cores)
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert waited > 0.05
