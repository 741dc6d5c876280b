"""Splits the time of a step on one rank: what it worked itself, and what it waited for the others."""

from typing import NamedTuple

from megatron_qwen.core_patches import timed_waits


class Waits(NamedTuple):
    """Seconds that a rank did not work itself.

    Args:
        communication_s: waited for collectives, sends and receives; 0 where they are not timed (on a GPU).
        queued_s: ready to run without a core, outside of these waits: something else ran on the rank's cores.
    """

    communication_s: float
    queued_s: float

    def since(self, earlier: "Waits") -> "Waits":
        """The difference of two readings."""
        return Waits(self.communication_s - earlier.communication_s, self.queued_s - earlier.queued_s)


class StepClock:
    """Reads the clocks of this process."""

    def __init__(self) -> None:
        self._waits = timed_waits.clock()

    @property
    def is_there(self) -> bool:
        """Whether waits are timed in this process: not on a GPU."""
        return self._waits is not None

    @property
    def sees_queue(self) -> bool:
        """Whether own work can be told from waits for a core that other processes have."""
        return self._waits is not None and self._waits.queue.is_there

    def read(self) -> Waits:
        """Totals of this process so far."""
        if self._waits is None:
            return Waits(0.0, 0.0)
        return Waits(self._waits.waited_s, self._waits.queue.seconds() - self._waits.queued_s)
