"""Stops a run whose steps are skipped again and again: their loss or gradient norm stays non-finite."""

from megatron_qwen.errors import NumericsError, Problem
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class NumericsGuard(Callback):
    """Raises NumericsError after too many skipped steps in a row; no checkpoint is written then."""

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Compares the count in the progress with resilience.max_consecutive_skips."""
        limit = trainer.components.config.resilience.max_consecutive_skips
        skips = trainer.components.progress.consecutive_skips
        if skips >= limit:
            spikes = trainer.components.config.resilience.spike_action == "skip"
            what = "skipped, as not finite or as spikes (resilience.spike_action)" if spikes else "not finite"
            raise NumericsError(
                Problem(
                    f"iteration {record.iteration}",
                    f"loss {record.result.loss}, gradient norm {record.result.grad_norm}",
                    f"{skips} steps in a row were {what} (resilience.max_consecutive_skips). The last good "
                    "checkpoint is kept; lower optim.learning_rate or check the data before you resume.",
                )
            )
