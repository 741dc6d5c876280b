"""Validation loss at intervals, on the same held-out samples every time."""

from typing import TYPE_CHECKING

from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.step import run_batch

if TYPE_CHECKING:
    from megatron_qwen.training.trainer import StepRecord, Trainer


class Validation(Callback):
    """Adds validation_loss to the record every eval_interval steps and at the last step."""

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        """Validates if it is time."""
        config, source = trainer.parts.config, trainer.parts.data.validation
        interval = config.training.eval_interval
        due = (interval and record.iteration % interval == 0) or record.iteration == config.training.train_iters
        if source is not None and due:
            record.extra["validation_loss"] = self.measure(trainer)

    def measure(self, trainer: "Trainer") -> float:
        """Mean loss over eval_iters batches, in nats per token."""
        parts = trainer.parts
        source, size = parts.data.validation, parts.config.training.global_batch_size
        assert source is not None
        parts.model.train(False)
        total = weight = 0.0
        with parts.model.whole_parameters():
            for index in range(parts.config.training.eval_iters):
                loss, tokens = run_batch(
                    parts.config,
                    parts.model,
                    parts.groups,
                    parts.forward_step,
                    source,
                    parts.shard,
                    first_sample=index * size,
                    global_batch_size=size,
                    forward_only=True,
                )
                total, weight = total + loss * tokens, weight + tokens
        parts.model.train(True)
        return total / max(weight, 1.0)
