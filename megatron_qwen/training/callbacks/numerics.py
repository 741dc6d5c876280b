"""Stops a run whose numbers do not come back."""

from megatron_qwen.errors import NumericsError, Problem
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class NumericsGuard(Callback):
    """Raises after too many steps in a row without a finite loss and gradient; no checkpoint is written then."""

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Counts are in the progress; this compares them with the limit."""
        limit = trainer.components.config.resilience.max_consecutive_skips
        skips = trainer.components.progress.consecutive_skips
        if skips >= limit:
            raise NumericsError(
                Problem(
                    f"iteration {record.iteration}",
                    f"loss {record.result.loss}, gradient norm {record.result.grad_norm}",
                    f"{skips} steps in a row were not finite (resilience.max_consecutive_skips). The last good "
                    "checkpoint is kept; lower optim.learning_rate or look at the data before going on.",
                )
            )
