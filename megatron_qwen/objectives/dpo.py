"""Direct preference optimization (arXiv 2305.18290) and its kin, on packed pairs under every layout."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_qwen.config.sections import ObjectiveConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.pair_fields import CHOSEN, PAIR, REFERENCE, REJECTED, SEQUENCE, SIDE
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead


class Dpo:
    """Mean over pairs of a loss of the margin between the rewards of the chosen and the rejected answer.

    The reward of an answer is beta x (its log-probability - that of the reference), sums over its tokens with loss.

    Args:
        settings: ``dpo_loss``, ``beta``, ``label_smoothing``.
        ends_of_turn: not used.
        unit: not used; a token counts or it does not.
    """

    extra_fields = (SIDE, SEQUENCE, PAIR, REFERENCE)
    metrics = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")

    def __init__(self, settings: ObjectiveConfig, ends_of_turn: Sequence[int] = (), unit: int = 1) -> None:
        self._settings = settings

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        sums, lengths = answer_log_probs(hidden, head, batch)
        side, known = batch.extra[SIDE.name], batch.extra[REFERENCE.name]
        ratios = sums - known
        chosen, rejected = (ratios[side == which] for which in (CHOSEN, REJECTED))
        losses = self._losses(chosen, rejected, lengths[side == CHOSEN], lengths[side == REJECTED])
        counted = float(head.counts)
        total = losses.sum()
        # Each context-parallel rank has the gradient of its own tokens, and one of them counts the loss.
        total = total * counted + (total - total.detach()) * (1.0 - counted)
        pairs = torch.full((), len(losses), device=total.device) * counted
        beta = self._settings.beta
        figures = (
            beta * (chosen - rejected),
            (chosen > rejected).float(),
            beta * chosen,
            beta * rejected,
            sums[side == CHOSEN],
            sums[side == REJECTED],
        )
        metrics = {
            name: Mean(values.detach().sum() * counted, pairs)
            for name, values in zip(self.metrics, figures, strict=True)
        }
        return ObjectiveResult(Mean(total, pairs), metrics)

    def _losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each pair, by the log-probability ratios of its answers and their lengths; all [pairs]."""
        kind, beta, smoothing = self._settings.dpo_loss, self._settings.beta, self._settings.label_smoothing
        if kind == "ipo":
            margin = chosen / chosen_tokens - rejected / rejected_tokens
            return (margin - 1 / (2 * beta)).square()
        margin = beta * (chosen - rejected)
        if kind == "hinge":
            return torch.relu(1 - margin)
        right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        if kind == "robust":
            return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        return (1 - smoothing) * right + smoothing * wrong


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
    if tokens * 1 == sum(batch.seq_lengths):
        places = torch.arange(tokens, device=batch.tokens.device)
        return torch.bucketize(places, batch.cu_seqlens[1:].long(), right=True).unsqueeze(0)
    return batch.extra[SEQUENCE.name]  # a context-parallel rank has a part of one sample
