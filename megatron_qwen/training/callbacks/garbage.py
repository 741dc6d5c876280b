"""Runs Python's garbage collection at the same step on all ranks."""

import gc

from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class GarbageCollection(Callback):
    """Collects every ``interval`` steps and never in between: all ranks wait in the next collective for one that
    collects.

    Args:
        interval: steps between collections, above 0.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def before_training(self, trainer: TrainerInterface) -> None:
        """Freezes what was built: it lives as long as the run, so collections need not traverse it."""
        gc.collect()  # first: what is frozen is not collected any more, garbage included
        gc.freeze()
        gc.disable()

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Collects if it is time."""
        if record.iteration % self.interval == 0:
            gc.collect()

    def close(self) -> None:
        """Re-enables automatic collection."""
        gc.enable()
        gc.unfreeze()
