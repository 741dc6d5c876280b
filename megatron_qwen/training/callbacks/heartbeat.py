"""Writes the heartbeat that the watchdog outside the ranks reads, and ends an attempt that a newer one has replaced."""

from collections.abc import Callable

from megatron_qwen.errors import Problem, UserError
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.phase_timeouts import STARTING, TRAINING
from megatron_qwen.training.callbacks.base import Callback, CallbackPhase, TrainerInterface
from megatron_qwen.training.step_record import StepRecord

_FINISHING = "finishing"


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
        self._iteration, self._between = heartbeat.resumed_at, TRAINING

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Checks that this attempt is still the newest, and writes the heartbeat.

        Raises:
            AttemptSuperseded: a newer attempt has started. This callback runs first, so the superseded attempt writes
                no metrics either.
        """
        self._iteration = record.iteration
        # Sequences of another stage may be longer, and kernels are compiled again.
        self._between = STARTING if self._stage_ends(trainer, record) else TRAINING
        self._beat(self._between)
        if self._between == STARTING:
            self.heartbeat.forget(TRAINING)

    def before_rerun(self) -> None:
        """Reports that the step goes on: its timeout is that of one pass."""
        self._beat(self._between)

    def on_phase(self, trainer: TrainerInterface, phase: CallbackPhase | None) -> None:
        """Reports a save or a validation, and its end, at once: each has a timeout of its own.

        The last save stays part of "finishing": it holds training up, and background saves say nothing of its time.
        """
        self._beat(self._between if self._between == _FINISHING else phase or self._between)

    def after_training(self, trainer: TrainerInterface) -> None:
        """Reports the phase "finishing": only the last save remains."""
        self._between = _FINISHING
        self.heartbeat.beat(self._between, trainer.components.progress.iteration)

    def _stage_ends(self, trainer: TrainerInterface, record: StepRecord) -> bool:
        """Whether the next step is the first of another data stage."""
        components = trainer.components
        if record.iteration >= components.config.training.train_iters:
            return False
        return components.data.at(components.progress.consumed_samples).stage.name != record.stage

    def _beat(self, phase: str) -> None:
        if self.heartbeat.due(phase) and not self.is_current():
            fix = "was superseded: a newer attempt owns the run now. This one stops without saving."
            raise AttemptSuperseded(Problem("attempt", self.heartbeat.attempt, fix))
        self.heartbeat.beat(phase, self._iteration)
