"""Pretraining: cross-entropy of the next token."""

import torch

from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.objectives.base import Mean, ObjectiveResult, whole_numbers
from megatron_qwen.objectives.output_head import OutputHead


class Pretrain:
    """Mean cross-entropy of the next token over all tokens that carry loss, in nats.

    Args:
        unit: weights of tokens are multiples of 1 / unit.
    """

    extra_fields: tuple[ExtraField, ...] = ()
    metrics: tuple[str, ...] = ()

    def __init__(self, unit: int = 1) -> None:
        self._unit = unit

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        weights = whole_numbers(batch.loss_mask, self._unit)
        found = head.cross_entropy(hidden, batch.labels, weights)
        return ObjectiveResult(Mean(found.total, weights.sum()))
