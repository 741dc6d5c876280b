"""Two sides of a comparison as processes that take turns: each keeps its state and waits while the other works."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from megatron_qwen import device
from tools.dev.benchmarks.rows import BenchmarkRow, against_peer


class Worker:
    """One side as a process that waits for work between its turns.

    Args:
        module: run as a program; it ends in ``serve``.
        arguments: its command line.
        threads: CPU threads.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, threads: int) -> None:
        # Threads wait as in a run: libgomp's spin for some milliseconds, then sleep through the other side's turn. With
        # OMP_WAIT_POLICY=PASSIVE each operation wakes them anew, which costs a step of small ones a third.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            if line.strip() == "ready":
                return
        raise RuntimeError(self._process.stderr.read())

    def run(self, calls: int) -> float:
        """Has it work; returns the seconds of all calls."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(work: Callable[[], object]) -> None:
    """A worker's part: answers every number on stdin with the seconds that so many calls took."""
    print("ready", flush=True)
    for line in sys.stdin:
        device.synchronize()
        started = time.perf_counter()
        for _ in range(int(line)):
            work()
        device.synchronize()
        print(time.perf_counter() - started, flush=True)


def in_turns(ours: Worker, theirs: Worker, *, rounds: int, calls: int) -> tuple[list[float], list[float]]:
    """Seconds of each side's turns, after one that does not count; who goes first changes from round to round."""
    sides = (ours, theirs)
    seconds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side.run(max(min(2, calls), calls // 2))
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[index].append(sides[index].run(calls))
    for side in sides:
        side.close()
    return seconds


def comparison(
    name: str, seconds: tuple[list[float], list[float]], *, tokens: int, peer: str, required: float, conditions: str
) -> BenchmarkRow:
    """A row in tokens per second; the ratio is the median over rounds of ours over theirs."""
    return against_peer(
        name,
        [theirs / ours for ours, theirs in zip(*seconds, strict=True)],
        ours=tokens / statistics.median(seconds[0]),
        against=tokens / statistics.median(seconds[1]),
        unit="tokens/s",
        peer=peer,
        required=required,
        conditions=conditions,
    )
