"""Direct preference optimization (arXiv 2305.18290) and its kin."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from megatron_qwen.data.reading.pair_fields import PAIR, REFERENCE, SEQUENCE, SIDE
from megatron_qwen.objectives.pairs import Answers, PairObjective


class Dpo(PairObjective):
    """A loss of the margin between the rewards of the chosen and the rejected answer.

    The reward of an answer is beta x (its log-probability - that of the reference), sums over its tokens with loss.
    ``nll_coeff`` adds the mean cross-entropy of the chosen answer's tokens (arXiv 2404.19733), which keeps its
    probability from falling along with the rejected one's.
    """

    extra_fields = (SIDE, SEQUENCE, PAIR, REFERENCE)
    metrics = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    with_reference = True

    def losses(self, chosen: Answers, rejected: Answers) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """See ``PairObjective``."""
        assert chosen.reference is not None
        assert rejected.reference is not None
        ours, theirs = chosen.logps - chosen.reference, rejected.logps - rejected.reference
        beta = self.settings.beta
        figures = (
            beta * (ours - theirs),
            (ours > theirs).float(),
            beta * ours,
            beta * theirs,
            chosen.logps,
            rejected.logps,
        )
        found = self._of_margin(ours, theirs, chosen.tokens, rejected.tokens)
        if self.settings.nll_coeff:
            found = found - self.settings.nll_coeff * chosen.means
        return found, dict(zip(self.metrics, figures, strict=True))

    def _of_margin(
        self, chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each pair, by the log-probability ratios of its answers and their lengths; all [pairs]."""
        kind, beta, smoothing = self.settings.dpo_loss, self.settings.beta, self.settings.label_smoothing
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
