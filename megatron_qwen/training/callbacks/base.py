"""What a callback may hook into, and what it may use of the trainer.

The trainer imports this file, so the interface of the trainer is defined here: that avoids a circular import.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

from megatron_qwen.errors import NumericsError, SilentCorruptionError
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.step_record import StepRecord

# The kinds of callback time that the performance card reports separately.
TimedAs = Literal["save", "validation", "evaluation"]
# What a callback may do for longer than a step takes; the heartbeat reports it.
CallbackPhase = Literal["saving", "validating", "evaluating"]


class TrainerInterface(Protocol):
    """The trainer, as callbacks use it."""

    @property
    def components(self) -> TrainingComponents:
        """Everything a step needs."""

    @property
    def callback_seconds(self) -> Mapping[TimedAs, float]:
        """Seconds spent in callbacks so far, by kind."""

    def stop(self, exit_code: int) -> None:
        """Ends the loop after this step; the process will exit with this code."""

    def enter(self, phase: CallbackPhase) -> None:
        """A callback says what it begins; the phase ends when its hook returns."""


class Callback:
    """A feature of the training loop. Every rank calls every hook, in the order of the list in ``build.py``."""

    # The kind of time it counts as; None if it is not reported separately.
    timed_as: ClassVar[TimedAs | None] = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Called once, after the checkpoint was loaded."""

    def before_optimizer_step(self, trainer: TrainerInterface) -> None:
        """Called when a step's gradients are reduced, finite and not yet clipped; not in a step that is skipped."""

    def before_rerun(self) -> None:
        """Called before a step's gradients are computed again: what was counted in its forward passes is void."""

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Called after every step; may add to ``record.extra`` and may call ``trainer.stop``."""

    def after_training(self, trainer: TrainerInterface) -> None:
        """Called once after the last step, also if the run was asked to stop."""

    def on_phase(self, trainer: TrainerInterface, phase: CallbackPhase | None) -> None:
        """Called when another callback begins something long, and with None when it has done it."""

    def on_numerics_error(self, error: NumericsError | SilentCorruptionError) -> None:
        """Called on all ranks together when the run ends with this error."""

    def close(self) -> None:
        """Called always, also after an error. Other ranks may be gone: it must not use collectives."""
