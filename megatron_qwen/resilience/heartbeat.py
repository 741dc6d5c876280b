"""heartbeat.json: rank 0 writes its progress there; the controller's watchdog detects a hang from it."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.files import atomic_write_json

log = logging.getLogger(__name__)
_INTERVAL_S = 1.0
# The watchdog is asked every 5 s. It is asked late where a Slurm command blocks the controller (60 s a try), and much
# later where the job was suspended. Taking the first for the second only delays the verdict. Chosen by hand.
_SUSPENDED_S = 120.0


@dataclass(frozen=True)
class Beat:
    """The content of heartbeat.json.

    Args:
        attempt: number of the attempt that wrote it.
        phase: what the run is doing: starting, training, finishing.
        iteration: last finished iteration.
        resumed_at: iteration that the attempt resumed from.
        count: number of beats written so far; it changes even where nothing else does.
    """

    attempt: int
    phase: str
    iteration: int
    resumed_at: int
    count: int


class Heartbeat:
    """Writes beats, at most one per second; a change of phase is written at once.

    Args:
        path: the file.
        attempt: number of this attempt.
        resumed_at: iteration that it resumed from.
    """

    def __init__(self, path: Path, *, attempt: int, resumed_at: int) -> None:
        self.path, self.attempt, self.resumed_at = path, attempt, resumed_at
        self._count, self._phase, self._written = 0, "", float("-inf")

    def due(self, phase: str) -> bool:
        """Whether ``beat`` would write: the phase has changed, or the last beat is a second old."""
        return phase != self._phase or time.monotonic() - self._written >= _INTERVAL_S

    def beat(self, phase: str, iteration: int) -> None:
        """Writes a beat unless the last one is less than a second old."""
        if not self.due(phase):
            return
        self._count += 1
        self._phase, self._written = phase, time.monotonic()
        beat = Beat(self.attempt, phase, iteration, self.resumed_at, self._count)
        try:
            atomic_write_json(self.path, vars(beat), indent=None)
        except OSError as error:  # a full disk must not hide why a run ends
            log.warning("heartbeat.json could not be written: %s", error)


def read_beat(path: Path) -> Beat | None:
    """The newest beat, or None."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


class Watchdog:
    """Detects that an attempt has written no heartbeat for too long.

    It compares times of this process only: clocks of different nodes may disagree.

    Args:
        read: returns the newest beat.
        attempt: number of the attempt to watch.
        start_s: timeout until the first step, in seconds.
        step_s: timeout after that, in seconds.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        read: Callable[[], Beat | None],
        *,
        attempt: int,
        start_s: float,
        step_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._attempt, self._clock = read, attempt, clock
        self._start_s, self._step_s = start_s, step_s
        self._last: Beat | None = None
        self._seen = self._asked = clock()

    def silence(self) -> str | None:
        """One line that describes the hang, or None while the run makes progress."""
        beat, now = self._read(), self._clock()
        if now - self._asked > _SUSPENDED_S:  # this process did not run either: the job was suspended
            self._seen += now - self._asked
        self._asked = now
        if beat is not None and beat.attempt == self._attempt and beat != self._last:
            self._last, self._seen = beat, now
            return None
        starting = self._last is None or self._last.phase == "starting"
        patience = self._start_s if starting else self._step_s
        if now - self._seen <= patience:
            return None
        where = (
            "before its first step"
            if self._last is None
            else f"{self._last.phase} after iteration {self._last.iteration}"
        )
        return f"no heartbeat for {patience:.0f} s, {where}"
