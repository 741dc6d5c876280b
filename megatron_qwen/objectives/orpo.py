"""Odds ratio preference optimization (arXiv 2403.07691): fine-tuning and preferences in one, without a reference."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from megatron_qwen.data.reading.pair_fields import PAIR, SEQUENCE, SIDE
from megatron_qwen.objectives.pairs import Answers, PairObjective

# The odds of an answer of probability 1 are infinite. Nearer to 1 than this fp32 has no probabilities.
_NEAREST_TO_ZERO = -1e-7


class Orpo(PairObjective):
    """Cross-entropy of the chosen answer, and beta x the loss of the odds of the chosen against the rejected one.

    The probability of an answer is the geometric mean of those of its tokens with loss. The cross-entropy is the mean
    over the chosen answer's tokens with loss, then over pairs; the prompt carries none.
    """

    extra_fields = (SIDE, SEQUENCE, PAIR)
    metrics = ("odds_ratio_log", "reward_accuracy", "nll", "logp_chosen", "logp_rejected")
    with_reference = False

    def losses(self, chosen: Answers, rejected: Answers) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """See ``PairObjective``."""
        ours, theirs = chosen.means, rejected.means
        ratio = (ours - theirs) - (_log_not(ours) - _log_not(theirs))
        figures = (ratio, (ours > theirs).float(), -ours, chosen.logps, rejected.logps)
        return -ours - self.settings.beta * F.logsigmoid(ratio), dict(zip(self.metrics, figures, strict=True))


def _log_not(logp: torch.Tensor) -> torch.Tensor:
    """Log of 1 - the probability whose log is given."""
    logp = logp.clamp(max=_NEAREST_TO_ZERO)
    near = logp > -math.log(2)
    # Each form is used where it keeps digits, and is given a harmless number elsewhere: its gradient there is 0 x inf.
    small = torch.expm1(torch.where(near, logp, -1.0)).neg().log()
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))
    return torch.where(near, small, large)
