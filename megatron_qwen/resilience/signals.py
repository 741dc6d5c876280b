"""Signals that ask a run to stop, noted at once and acted on at the end of the step."""

import os
import signal
from types import FrameType

# Slurm sends TERM at a time limit or requeue and USR2 as an early warning; NCCL keeps USR1 for itself.
_STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
EXIT_INTERRUPTED = 130


class StopSignals:
    """Remembers that a stop was asked for. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Puts the handlers in place; main thread only."""
        for number in _STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        self.received = signal.Signals(number)
