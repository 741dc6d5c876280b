"""Validation loss at intervals, on the same held-out samples every time."""

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import BatchRequest, micro_batches
from megatron_qwen.data.reading.held_out_samples import HeldOutSamples
from megatron_qwen.data.reading.samples import SampleSource
from megatron_qwen.data.reading.training_data import StageReader
from megatron_qwen.objectives.build import build_objective
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.part_losses import ConversationParts, PartedSamples, PartLosses, TextParts, bytes_of_tokens
from megatron_qwen.training.step import run_batch
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)


class Validation(Callback):
    """Adds validation_loss to the record every eval_interval steps and at the last step.

    In pretraining with a known tokenizer also ``validation_bits_per_byte/SOURCE``. In fine-tuning
    ``validation_loss/SOURCE/assistant`` and ``.../prompt``, in nats per token. Of an objective with metrics these, as
    ``validation_NAME``.

    Args:
        tokenizer: directory, for the bytes of the text; None measures the loss alone.
    """

    timed_as = "validation"

    def __init__(self, tokenizer: Path | None = None) -> None:
        self._samples: tuple[StageReader, HeldOutSamples] | None = None
        self._tokenizer = tokenizer
        self._by_part: _ByPart | None = None
        self._metrics: dict[str, float] = {}

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
            record.extra.update({f"validation_{name}": value for name, value in self._metrics.items()})
            record.extra.update({} if self._by_part is None else self._by_part.found)

    def measure(self, trainer: TrainerInterface) -> float:
        """Mean loss of the objective over eval_iters batches; of pretraining in nats per token."""
        components = trainer.components
        held_out, config = self._of(trainer)
        samples: SampleSource = held_out
        forward_step = components.forward_step
        by_part = self._by_part or self._make_by_part(components)
        if by_part is not None:
            samples, forward_step = by_part.begin(held_out)
        training = config.training
        components.model.train(False)
        total = weight = 0.0
        sums = dict.fromkeys(forward_step.metrics, (0.0, 0.0))
        with components.model.whole_parameters():
            for index in range(training.eval_iters):
                size = training.global_batch_size
                request = BatchRequest(index * size, size, training.micro_batch_size)
                batches = [
                    batch.to(components.batch_slice.device)
                    for batch in micro_batches(samples, components.batch_slice, request)
                ]
                done = run_batch(config, components.model, components.groups, forward_step, batches, forward_only=True)
                total, weight = total + done.loss * done.weight, weight + done.weight
                for name, (value, count) in sums.items():
                    more = done.metric_weights[name]
                    sums[name] = value + done.metrics[name] * more, count + more
        components.model.train(True)
        self._metrics = {name: value / count for name, (value, count) in sums.items() if count}
        if by_part is not None:
            by_part.end(held_out)
        return total / max(weight, 1.0)

    def _make_by_part(self, components: TrainingComponents) -> "_ByPart | None":
        if components.config.objective.kind == "sft":
            sources = components.data.sources
            texts = [name for name, source in sources.items() if source.tokens.loss_mask(0, 1) is None]
            self._by_part = _ByPart(components, ConversationParts(texts))
        elif components.config.objective.kind == "pretrain" and self._tokenizer is not None:
            counts = bytes_of_tokens(self._tokenizer, components.batch_slice.device)
            if counts is None:
                log.info("no bits per byte: the tokens of %s do not say which text they stand for", self._tokenizer)
                self._tokenizer = None
                return None
            self._by_part = _ByPart(components, TextParts(counts))
        return self._by_part

    def _of(self, trainer: TrainerInterface) -> tuple[HeldOutSamples, RunConfig]:
        """The held-out samples of the data stage of the last step, and the configuration in force there."""
        reader = trainer.components.data.latest(trainer.components.progress.consumed_samples)
        if self._samples is None or self._samples[0] is not reader:
            self._samples = reader, trainer.components.data.validation(reader)
        return self._samples[1], reader.config


class _ByPart:
    """Measures the parts of the held-out samples.

    Args:
        components: of the run.
        parts: how they are divided.

    Attributes:
        found: what a record gets.
    """

    def __init__(self, components: TrainingComponents, parts: TextParts | ConversationParts) -> None:
        self._place, self._parts = components.batch_slice.device, parts
        objective = build_objective(
            components.config, ends_of_turn=components.data.ends_of_turn, loss_unit=components.data.loss_unit
        )
        self._losses = PartLosses(objective, components.groups, parts)
        self._forward_step = ForwardStep(components.config, components.groups, self._losses)
        self.found: Mapping[str, float] = {}

    def begin(self, held_out: HeldOutSamples) -> tuple[SampleSource, ForwardStep]:
        """What takes the place of samples and forward step."""
        self._losses.begin(held_out.names, self._place)
        return PartedSamples(held_out, self._parts), self._forward_step

    def end(self, held_out: HeldOutSamples) -> None:
        """Adds up what all ranks have."""
        self.found = self._losses.means(held_out.names)
