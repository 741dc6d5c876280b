"""Tells the watchdog outside the ranks that the run moves, and notices that another attempt has taken it over."""

from collections.abc import Callable

from megatron_qwen.errors import Problem, UserError
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class Superseded(UserError):
    """Another attempt at the run has begun; what this one would write would be wrong (exit 1)."""

    kind = "superseded"


class SignsOfLife(Callback):
    """Beats after every step, on rank 0.

    Args:
        heartbeat: the file.
        is_current: whether this attempt is still the newest of the run; asked when a beat is written.
    """

    def __init__(self, heartbeat: Heartbeat, *, is_current: Callable[[], bool]) -> None:
        self.heartbeat, self.is_current = heartbeat, is_current

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Beats; ends an attempt that outlived its job.

        Raises:
            Superseded: another attempt has begun. First among the callbacks, so that no metrics are written either.
        """
        if self.heartbeat.beat("training", record.iteration) and not self.is_current():
            fix = "has been followed by another on other nodes, which owns the run now."
            raise Superseded(Problem("attempt", self.heartbeat.attempt, fix))

    def after_training(self, trainer: TrainerInterface) -> None:
        """What is left is the last save."""
        self.heartbeat.beat("finishing", trainer.components.progress.iteration)
