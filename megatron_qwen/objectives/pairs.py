"""What objectives of pairs share: log-probabilities of whole answers, and a mean over the pairs of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.pair_fields import CHOSEN, REFERENCE, REJECTED, SEQUENCE, SIDE
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead


@dataclass(frozen=True)
class Answers:
    """The chosen or the rejected answers of a batch; [pairs] each.

    Args:
        logps: sum of the log-probabilities of an answer's tokens with loss.
        tokens: how many they are.
        reference: the sum by the reference; None for an objective without one.
    """

    logps: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor | None

    @property
    def means(self) -> torch.Tensor:
        """Mean log-probability of an answer's tokens."""
        return self.logps / self.tokens


class PairObjective(ABC):
    """Mean over the pairs of the global batch of a loss of their answers, whatever their lengths, rows and layout.

    Args:
        settings: of the objective.
        ends_of_turn: not used.
        unit: not used; a token counts or it does not.
    """

    extra_fields: tuple[ExtraField, ...]
    metrics: tuple[str, ...]
    with_reference: ClassVar[bool]

    def __init__(self, settings: ObjectiveConfig, ends_of_turn: Sequence[int] = (), unit: int = 1) -> None:
        self.settings = settings

    @abstractmethod
    def losses(self, chosen: Answers, rejected: Answers) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Loss of each pair, and by name each of ``metrics``; [pairs] each."""

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        sums, lengths = answer_log_probs(hidden, head, batch)
        known = batch.extra[REFERENCE.name] if self.with_reference else None
        side = batch.extra[SIDE.name]
        chosen, rejected = (
            Answers(sums[here], lengths[here], None if known is None else known[here])
            for here in (side == CHOSEN, side == REJECTED)
        )
        losses, figures = self.losses(chosen, rejected)
        counted = float(head.counts)
        total = losses.sum()
        # Each context-parallel rank has the gradient of its own tokens, and one of them counts the loss.
        total = total * counted + (total - total.detach()) * (1.0 - counted)
        pairs = torch.full((), len(losses), device=total.device) * counted
        metrics = {name: Mean(figures[name].detach().sum() * counted, pairs) for name in self.metrics}
        return ObjectiveResult(Mean(total, pairs), metrics)


def answer_log_probs(hidden: torch.Tensor, head: OutputHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the log-probabilities of the tokens with loss of every sequence, and how many they are; [sequences] each.

    Both are the same on every context-parallel rank.
    """
    carries = batch.loss_mask > 0
    logps = head.log_probs_where(hidden, batch.labels, carries)
    sequences = len(batch.extra[SIDE.name])
    numbers = sequence_numbers(batch).t()[carries.t()]
    return head.sequence_sums(logps, numbers, sequences), head.sequence_sums(torch.ones_like(logps), numbers, sequences)


def sequence_numbers(batch: Batch) -> torch.Tensor:
    """Number of the sequence that each token of a packed row is of, [1, tokens]."""
    assert batch.cu_seqlens is not None
    tokens = batch.tokens.shape[1]
    if tokens == sum(batch.seq_lengths):
        places = torch.arange(tokens, device=batch.tokens.device)
        return torch.bucketize(places, batch.cu_seqlens[1:].long(), right=True).unsqueeze(0)
    return batch.extra[SEQUENCE.name]  # a context-parallel rank has a part of one sample
