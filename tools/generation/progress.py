"""How far a program with many requests is."""

import sys
import time
from typing import TextIO

from megatron_qwen.metrics.console import duration

_LIVE_S, _PLAIN_S = 0.2, 15.0


class RequestProgress:
    """Requests that are answered, with the time left.

    Args:
        name: of what is counted.
        stream: where to; a terminal gets one line that is written over, anything else a line now and then.
    """

    def __init__(self, name: str, *, stream: TextIO = sys.stderr) -> None:
        self._name, self._stream, self._live = name, stream, stream.isatty()
        self._started = self._shown = time.monotonic()
        self._before: int | None = None

    def __call__(self, done: int, of: int) -> None:
        """Shows that so many are done; what the first call names was done before."""
        if self._before is None:
            self._before, self._started = done, time.monotonic()
        now = time.monotonic()
        if now - self._shown < (_LIVE_S if self._live else _PLAIN_S):
            return
        self._shown = now
        rate = (done - self._before) / max(now - self._started, 1e-9)
        left = f"  {rate:,.1f} a second  {duration((of - done) / rate)} left" if rate else ""
        text = f"{done:,} of {of:,} {self._name}{left}"
        self._stream.write(f"\r\x1b[2K{text}" if self._live else text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
