"""Signals that ask a run to stop: recorded when they arrive, acted on at the end of the step."""

import os
import signal
from types import FrameType

# Slurm sends SIGTERM at the time limit or at a requeue, and SIGUSR2 as an early warning. SIGUSR1 is left alone because
# NCCL uses it.
_STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
EXIT_INTERRUPTED = 130


class StopSignals:
    """Remembers which stop signal arrived. A second Ctrl-C ends the process at once."""

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
