"""Writes the heartbeat that the watchdog outside the ranks reads, and ends an attempt that a newer one has replaced."""

from collections.abc import Callable

from megatron_qwen.errors import Problem, UserError
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class AttemptSuperseded(UserError):
    """A newer attempt at the run has started, so this one must not write to the run any more (exit 1)."""

    kind = "superseded"


class HeartbeatCallback(Callback):
    """Writes a heartbeat after every step, on rank 0.

    Args:
        heartbeat: the file.
        is_current: whether this attempt is still the newest of the run; asked before a beat is written.
    """

    def __init__(self, heartbeat: Heartbeat, *, is_current: Callable[[], bool]) -> None:
        self.heartbeat, self.is_current = heartbeat, is_current

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Checks that this attempt is still the newest, and writes the heartbeat.

        Raises:
            AttemptSuperseded: a newer attempt has started. This callback runs first, so the superseded attempt writes
                no metrics either.
        """
        if self.heartbeat.due("training") and not self.is_current():
            fix = "was superseded: a newer attempt owns the run now. This one stops without saving."
            raise AttemptSuperseded(Problem("attempt", self.heartbeat.attempt, fix))
        self.heartbeat.beat("training", record.iteration)

    def after_training(self, trainer: TrainerInterface) -> None:
        """Reports the phase "finishing": only the last save remains."""
        self.heartbeat.beat("finishing", trainer.components.progress.iteration)
