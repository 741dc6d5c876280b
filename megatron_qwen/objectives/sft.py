"""Supervised fine-tuning: cross-entropy of what the assistant wrote."""

from collections.abc import Sequence

import torch

from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.averages import COUNT, WEIGHT, fields_of
from megatron_qwen.objectives.base import Mean, ObjectiveResult, whole_numbers
from megatron_qwen.objectives.output_head import OutputHead

_TRAINED, _END = "trained_fraction", "end_probability"


class Sft:
    """Mean cross-entropy over the tokens that carry loss, in nats; over all of the global batch, whatever its layout.

    Args:
        settings: ``average`` says what counts the same: tokens, sequences (conversations) or samples (packed rows).
        ends_of_turn: ids that end an answer. Where there are any, ``end_probability`` is the mean probability that the
            model gives to the end where an answer ends: near 0, it goes on for ever.
        unit: weights of tokens are multiples of 1 / unit.
    """

    def __init__(self, settings: ObjectiveConfig, ends_of_turn: Sequence[int] = (), unit: int = 1) -> None:
        self._by_token, self._ends, self._unit = settings.average == "token", tuple(ends_of_turn), unit
        self.metrics = (_TRAINED, _END) if self._ends else (_TRAINED,)
        self.extra_fields = fields_of(settings.average)

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        mask = whole_numbers(batch.loss_mask, self._unit)
        weights = mask if self._by_token else batch.extra[WEIGHT.name]
        count = mask.sum() if self._by_token else batch.extra[COUNT.name].sum()
        held = mask.numel() if batch.padding is None else (~batch.padding).sum()
        trained = Mean((mask > 0).sum().float(), torch.as_tensor(held, device=mask.device))
        found = head.cross_entropy(hidden, batch.labels, weights, skip_weightless=True)
        metrics = {_TRAINED: trained}
        if self._ends:
            ends = torch.isin(found.targets, torch.tensor(self._ends, device=mask.device)) & (found.weights > 0)
            metrics[_END] = Mean((found.losses.neg().exp() * ends).sum(), ends.sum())
        return ObjectiveResult(Mean(found.total, count), metrics)
