"""heartbeat.json: rank 0 writes its progress there; the controller's watchdog detects a hang from it."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_qwen.files import atomic_write_json
from megatron_qwen.resilience.phase_timeouts import STARTING, PhaseTimeouts, PhaseTimes

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
        phase: what the run is doing: starting, training, saving, validating, evaluating, finishing.
        iteration: last finished iteration.
        resumed_at: iteration that the attempt resumed from.
        count: number of beats written so far; it changes even where nothing else does.
        world_size: ranks of the attempt.
        longest_s: the longest of each phase in seconds, also of earlier attempts with as many ranks.
        seen: how often each phase has ended in this attempt.
    """

    attempt: int
    phase: str
    iteration: int
    resumed_at: int
    count: int
    world_size: int = 0
    longest_s: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)

    @property
    def times(self) -> PhaseTimes:
        """How long phases have taken."""
        return PhaseTimes(self.longest_s, self.seen)


class Heartbeat:
    """Writes beats, at most one per second; a change of phase is written at once.

    Args:
        path: the file. The longest phases of an earlier attempt with as many ranks are taken over from it.
        attempt: number of this attempt.
        resumed_at: iteration that it resumed from.
        world_size: ranks of the attempt.
        age_s: how long ago the process began, in seconds.
        timeouts: of the run. A phase that has lasted longer without being ended was suspended, and teaches nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        attempt: int,
        resumed_at: int,
        world_size: int = 0,
        age_s: float = 0.0,
        timeouts: PhaseTimeouts | None = None,
    ) -> None:
        self.path, self.attempt, self.resumed_at, self.world_size = path, attempt, resumed_at, world_size
        self._count, self._phase, self._written = 0, "", float("-inf")
        self._timeouts, self._since = timeouts or PhaseTimeouts(), time.monotonic() - age_s
        earlier = read_beat(path)
        self._times = PhaseTimes(earlier.longest_s if earlier and earlier.world_size == world_size else {})

    def due(self, phase: str) -> bool:
        """Whether ``beat`` would write: the phase has changed, or the last beat is a second old."""
        return phase != self._phase or time.monotonic() - self._written >= _INTERVAL_S

    def beat(self, phase: str, iteration: int) -> None:
        """Ends the phase that was begun by the last call, and begins this one.

        It is written unless the phase is the same and the last beat is less than a second old.
        """
        lasted_s, self._since = time.monotonic() - self._since, time.monotonic()
        if self._phase and lasted_s <= self._timeouts.of(self._phase, self._times):
            self._times = self._times.with_one(self._phase, lasted_s)
        elif not self._phase:
            self._since -= lasted_s  # the set-up began with the process
        if not self.due(phase):
            return
        self._count += 1
        self._phase, self._written = phase, time.monotonic()
        longest_s = {name: round(seconds, 3) for name, seconds in self._times.longest_s.items()}
        seen = dict(self._times.counts)
        beat = Beat(self.attempt, phase, iteration, self.resumed_at, self._count, self.world_size, longest_s, seen)
        try:
            atomic_write_json(self.path, vars(beat), indent=None)
        except OSError as error:  # a full disk must not hide why a run ends
            log.warning("heartbeat.json could not be written: %s", error)

    def forget(self, phase: str) -> None:
        """From now on a phase does something else, and has to show again how long it takes."""
        self._times = self._times.without_count(phase)


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
        timeouts: of the phases.
        world_size: ranks of the attempt; what an earlier one with as many has learnt holds for this one.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        read: Callable[[], Beat | None],
        *,
        attempt: int,
        timeouts: PhaseTimeouts,
        world_size: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._attempt, self._clock, self._timeouts = read, attempt, clock, timeouts
        earlier = read()
        self._earlier = PhaseTimes(earlier.longest_s if earlier and earlier.world_size == world_size else {})
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
        if self._last is None:
            patience = self._timeouts.of(STARTING, self._earlier)
        else:
            patience = self._timeouts.of(self._last.phase, self._last.times)
        if now - self._seen <= patience:
            return None
        where = (
            "before its first step"
            if self._last is None
            else f"{self._last.phase} after iteration {self._last.iteration}"
        )
        return f"no heartbeat for {patience:.0f} s, {where}"
