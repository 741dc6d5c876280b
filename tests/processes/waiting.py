"""Waits for what a process of a test writes."""

import subprocess
import time
from pathlib import Path


def wait_for_lines(process: "subprocess.Popen[bytes]", path: Path, count: int, *, timeout_s: float = 120) -> None:
    """Until a file has so many whole lines: that it exists says only that its writer has opened it."""
    deadline = time.monotonic() + timeout_s
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, f"{path} has not {count} lines after {timeout_s} s"
        time.sleep(0.005)
