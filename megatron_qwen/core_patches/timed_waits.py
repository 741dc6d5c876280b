"""Waits for communication are timed, so that a rank knows which part of a step it has worked itself.

Replaces: ``Work.wait`` of ``torch.distributed.distributed_c10d``. Every collective, send and receive over gloo waits
    there, in torch's own synchronous calls too. What the call does and returns stays as it is.
Needed: with every torch so far (2.15 too). Ranks of a step wait for one another, so all take the time of the slowest:
    only what is left without these waits tells which one that was. The clock costs a wait some microseconds of a core,
    most of them for two readings of /proc/thread-self/schedstat (`mq bench stragglers`).
When: at any time, on processes without a GPU. Over NCCL the call returns before the communication has taken place, so
    its time says nothing.
Can go: when torch counts the time of waits itself.
"""

import functools
import os
import threading
import time
from typing import Any

from torch.distributed.distributed_c10d import Work

from megatron_qwen.core_patches.replacement import wrap

_CLOCK = "clock"


class RunQueueClock:
    """How long this thread has been ready to run and waited for a core, from Linux's scheduler."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._process = 0

    @property
    def is_there(self) -> bool:
        """Whether the kernel counts it: Linux does, unless it was built without scheduler statistics."""
        self.seconds()
        return self._file is not None

    def seconds(self) -> float:
        """Since the thread began; 0 where the kernel does not count it."""
        if self._process != os.getpid():  # a forked child must not read its parent's
            self._process = os.getpid()
            try:
                self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._file = None
        if self._file is None:
            return 0.0
        # Nanoseconds on a core, nanoseconds ready without one, number of time slices.
        return int(os.pread(self._file, 96, 0).split()[1]) / 1e9


class WaitClock:
    """Seconds that the main thread has waited for communication.

    Attributes:
        calls: number of such waits so far.
        waited_s: in all of them.
        queued_s: the part of it in which the thread was ready to run and had no core.
        queue: how long the thread waited for a core, in and out of such waits.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.waited_s = self.queued_s = 0.0
        self.queue = RunQueueClock()


def apply() -> None:
    """Wraps it, once."""
    wrap(Work, "wait", timed)


def clock() -> WaitClock | None:
    """The clock of this process; None where the patch is not applied."""
    found = getattr(Work.wait, _CLOCK, None)
    return found if isinstance(found, WaitClock) else None


def timed(plain: Any) -> Any:
    """A wait that does what ``plain`` does, with a clock of its own."""
    waits = WaitClock()

    @functools.wraps(plain)
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # a save in the background
            return plain(work, *args, **kwargs)
        queued, started = waits.queue.seconds(), time.perf_counter()
        try:
            return plain(work, *args, **kwargs)
        finally:
            waits.calls += 1
            waits.waited_s += time.perf_counter() - started
            waits.queued_s += waits.queue.seconds() - queued

    setattr(wait, _CLOCK, waits)
    return wait
