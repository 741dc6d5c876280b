"""What a conversion will need, said before it begins, and how far it is."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from megatron_qwen.files import sync_stream
from megatron_qwen.metrics.console import duration

_LIVE_S, _PLAIN_S = 0.2, 15.0
# Of what is to be written, a trial writes this part before: it adds 3 % to the time. At most a second at 64 MB/s.
_TRIAL_PART, _TRIAL_BYTES = 32, 64 << 20
_HASHED = 4 << 20  # 10 ms of SHA-256 without an instruction for it


def gb(count: float) -> str:
    """Bytes in the units people use: ``15.2 GB``, ``3.4 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


@dataclass(frozen=True)
class ConversionPrediction:
    """What a conversion will need.

    Args:
        peak_memory_bytes: resident memory of the process at its peak.
        disk_bytes: bytes that are still to be written.
        free_bytes: bytes that are free where they go.
        seconds: how long it takes at least: a disk that is fast for a moment may be slower for long.
        write_rate: bytes a second that the disk took in a trial; None where there was none.
    """

    peak_memory_bytes: int
    disk_bytes: int
    free_bytes: int
    seconds: float
    write_rate: float | None

    def __str__(self) -> str:
        trial = f" (a trial of the disk gave {self.write_rate / 1e9:.2f} GB/s)" if self.write_rate else ""
        return (
            f"needs at most {gb(self.peak_memory_bytes)} of memory, {gb(self.disk_bytes)} of disk "
            f"({gb(self.free_bytes)} free) and at least {duration(max(1, self.seconds))}{trial}"
        )


def trial_write_rate(directory: Path, left: int) -> float:
    """Bytes a second that a disk takes, from writing and removing a small file.

    Args:
        directory: where.
        left: bytes that are to be written, of which the file has a small part.
    """
    path, block = directory / ".trial", bytes(1 << 20)
    blocks = max(1, min(left // _TRIAL_PART, _TRIAL_BYTES) // len(block))
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block)
            sync_stream(file)
    finally:
        path.unlink(missing_ok=True)
    return blocks * len(block) / (time.perf_counter() - started)


def digest_rate(new_digest: Callable[[], Any]) -> float:
    """Bytes a second that one core hashes."""
    digest, block = new_digest(), bytes(_HASHED)
    started = time.perf_counter()
    digest.update(block)
    return _HASHED / (time.perf_counter() - started)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far; imports alone reach more than they keep.

    From the kernel's own note of this program (VmHWM): getrusage counts what its parent had at the fork as well.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that a user may still write in a file system."""
    return int(psutil.disk_usage(os.fspath(path)).free)


class ByteProgress:
    """A bar of bytes with GB/s and the time left; safe to call from several threads.

    Args:
        total: bytes in all.
        stream: where to; a terminal gets one line that is written over, anything else a line now and then.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, stream: TextIO = sys.stderr, quiet: bool = False) -> None:
        self.total, self.done = total, 0
        self._stream, self._live, self._quiet = stream, stream.isatty(), quiet
        self._lock = threading.Lock()
        self._started = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Notes that so many bytes more are done."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self._quiet or now - self._shown < (_LIVE_S if self._live else _PLAIN_S):
                return
            self._shown = now
            text = self._text(now - self._started)
            self._stream.write(f"\r\x1b[2K{text}" if self._live else text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self._live and not self._quiet:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

    def _text(self, seconds: float) -> str:
        share = self.done / max(1, self.total)
        rate = self.done / max(seconds, 1e-9)
        bar = "#" * round(30 * share)
        left = duration((self.total - self.done) / max(rate, 1))
        return f"[{bar:<30}] {share:4.0%}  {gb(self.done)} of {gb(self.total)}  {rate / 1e9:.2f} GB/s  {left} left"
