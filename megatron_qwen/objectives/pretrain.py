"""Pretraining: cross-entropy of the next token."""

import torch

from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead


class Pretrain:
    """Mean cross-entropy of the next token over all tokens that carry loss, in nats."""

    extra_fields: tuple[ExtraField, ...] = ()
    metrics: tuple[str, ...] = ()

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        found = head.cross_entropy(hidden, batch.labels, batch.loss_mask)
        return ObjectiveResult(Mean(found.total, batch.loss_mask.sum()))
