"""Ranks of this machine: a signal that comes while they are being started is not lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from megatron_qwen.job.local_ranks import LocalRanks

# Says when it has its handler, and ends as a rank does that was asked to stop.
RANK = """
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


class Signalled(LocalRanks):
    """Gets SIGUSR2 after it has started its first rank."""

    def _start(self, rank: int, port: int, output: IO[bytes] | None) -> "subprocess.Popen[bytes]":
        ready = self.run_dir / f"ready_{rank}"
        process = subprocess.Popen([sys.executable, "-c", RANK, ready])
        while not ready.exists():
            assert process.poll() is None
        if rank == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
        return process


@pytest.fixture
def handlers():
    """The handlers of this process, as they were."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("size", [1, 3])
def test_a_signal_during_the_start_reaches_every_rank(size, handlers, tmp_path: Path):
    ranks = Signalled(tmp_path, world_size=size, log_dir=tmp_path / "logs")
    assert ranks.run() == 75
    assert sorted(end.code for end in ranks.ends()) == [75] * size


class Ended(LocalRanks):
    """Ranks that have ended in given ways before anybody looks."""

    ways: tuple[str, ...] = ()

    def _start(self, rank: int, port: int, output: IO[bytes] | None) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, "-c", f"import os, signal; {self.ways[rank]}"])
        process.wait()
        return process


LOST, KILLED, FAILED = "os._exit(76)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"


@pytest.mark.parametrize(
    ("ways", "code", "told"),
    [
        ((LOST, KILLED), 76, "rank 1 was killed by SIGKILL"),  # the others lost it
        ((KILLED, LOST, LOST), 76, "rank 0 was killed by SIGKILL"),
        ((LOST, KILLED, FAILED), 3, ""),  # its own error is the cause
        ((LOST, LOST), 76, ""),
    ],
)
def test_the_cause_is_told_whoever_is_looked_at_first(ways, code, told, handlers, tmp_path, capsys):
    ranks = Ended(tmp_path, world_size=len(ways), log_dir=tmp_path / "logs")
    ranks.ways = ways
    assert ranks.run() == code
    said = capsys.readouterr().err
    assert ("was killed by" in said) is bool(told)
    assert told in said
