"""Supervised fine-tuning: cross-entropy of what the assistant wrote."""

import torch

from megatron_qwen.config.sections import ObjectiveConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.averages import COUNT, WEIGHT, fields_of
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead


class Sft:
    """Mean cross-entropy over the tokens that carry loss, in nats; over all of the global batch, whatever its layout.

    Args:
        settings: ``average`` says what counts the same: tokens, sequences (conversations) or samples (packed rows).
    """

    metrics = ("trained_fraction",)

    def __init__(self, settings: ObjectiveConfig) -> None:
        self._by_token = settings.average == "token"
        self.extra_fields = fields_of(settings.average)

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        mask = batch.loss_mask
        weights = mask if self._by_token else batch.extra[WEIGHT.name]
        count = mask.sum() if self._by_token else batch.extra[COUNT.name].sum()
        held = mask.numel() if batch.padding is None else (~batch.padding).sum()
        trained = Mean((mask > 0).sum().float(), torch.as_tensor(held, device=mask.device))
        return ObjectiveResult(
            Mean(head.cross_entropy(hidden, batch.labels, weights), count), {self.metrics[0]: trained}
        )
