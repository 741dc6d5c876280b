"""Validation loss at intervals, on the same held-out samples every time."""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import BatchRequest, micro_batches
from megatron_qwen.data.reading.training_data import HeldOutSamples, StageReader
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step import run_batch
from megatron_qwen.training.step_record import StepRecord


class Validation(Callback):
    """Adds validation_loss to the record every eval_interval steps and at the last step."""

    timed_as = "validation"

    def __init__(self) -> None:
        self._samples: tuple[StageReader, HeldOutSamples] | None = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Opens the held-out samples, so that too few of them are reported before the first step."""
        self._of(trainer)

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Validates if it is time."""
        config = trainer.components.config
        interval = config.training.eval_interval
        due = (interval and record.iteration % interval == 0) or record.iteration == config.training.train_iters
        if due:
            trainer.enter("validating")
            record.extra["validation_loss"] = self.measure(trainer)

    def measure(self, trainer: TrainerInterface) -> float:
        """Mean loss of the objective over eval_iters batches; of pretraining in nats per token."""
        components = trainer.components
        samples, config = self._of(trainer)
        training = config.training
        components.model.train(False)
        total = weight = 0.0
        with components.model.whole_parameters():
            for index in range(training.eval_iters):
                size = training.global_batch_size
                request = BatchRequest(index * size, size, training.micro_batch_size)
                batches = [
                    batch.to(components.batch_slice.device)
                    for batch in micro_batches(samples, components.batch_slice, request)
                ]
                done = run_batch(
                    config, components.model, components.groups, components.forward_step, batches, forward_only=True
                )
                total, weight = total + done.loss * done.weight, weight + done.weight
        components.model.train(True)
        return total / max(weight, 1.0)

    def _of(self, trainer: TrainerInterface) -> tuple[HeldOutSamples, RunConfig]:
        """The held-out samples of the data stage of the last step, and the configuration in force there."""
        reader = trainer.components.data.latest(trainer.components.progress.consumed_samples)
        if self._samples is None or self._samples[0] is not reader:
            self._samples = reader, trainer.components.data.validation(reader)
        return self._samples[1], reader.config
