"""What a callback may hook into, and what it may use of the trainer.

The trainer imports this file, so what callbacks know of the trainer stands here: nothing imports in a circle.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.step_record import StepRecord

# What the performance card tells apart of the time in callbacks.
TimedAs = Literal["save", "validation"]


class TrainerInterface(Protocol):
    """The trainer, as callbacks use it."""

    @property
    def components(self) -> TrainingComponents:
        """Everything a step needs."""

    @property
    def callback_seconds(self) -> Mapping[TimedAs, float]:
        """Seconds in callbacks after the steps so far."""

    def stop(self, exit_code: int) -> None:
        """Ends the loop after this step; the process will exit with this code."""


class Callback:
    """A feature of the loop; every rank calls every hook, in the order the callbacks are listed."""

    # As what its time counts; None where it is not told apart.
    timed_as: ClassVar[TimedAs | None] = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Once, after a checkpoint was loaded."""

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """After every step; may add to ``record.extra`` and may call ``trainer.stop``."""

    def after_training(self, trainer: TrainerInterface) -> None:
        """Once, after the last step, also when the run was asked to stop."""

    def on_numerics_error(self) -> None:
        """On all ranks together, when the run ends because its numbers are not finite."""

    def close(self) -> None:
        """Always, also after an error; must not use collectives."""
