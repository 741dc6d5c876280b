"""How far two models' predictions are apart, from logits that come in blocks of the vocabulary.

A block of logits is used once, so [positions, vocabulary] of either model is never in memory: the log-sum-exp of both
and the expectation of the difference are kept for every position and rescaled when a larger logit comes (online
softmax).
"""

from dataclasses import dataclass

import torch

# Logits of each model at a time: 16 MiB in float32, and about 150 MiB with what is made of them.
_VALUES = 1 << 22


@dataclass(frozen=True)
class Divergence:
    """Two models on the same tokens.

    Args:
        mean: of the Kullback-Leibler divergence from the first model's predictions to the second's, nats a position.
        worst: at the position where it is largest.
        perplexity: of the first model on the tokens that follow.
        other_perplexity: of the second.
    """

    mean: float
    worst: float
    perplexity: float
    other_perplexity: float


class PredictionSums:
    """Sums over the vocabulary for every position.

    Args:
        labels: int64 [positions], the token that follows; -1 where none does.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        count = labels.shape[0]
        self._labels = labels
        self._largest = torch.full((2, count), -torch.inf, dtype=torch.float64)
        self._sums = torch.zeros(2, count, dtype=torch.float64)
        self._label_logits = torch.zeros(2, count, dtype=torch.float64)
        self._apart = torch.zeros(count, dtype=torch.float64)
        self._best = torch.full((2, count), -torch.inf)
        self._token = torch.zeros(2, count, dtype=torch.long)

    def add(self, positions: slice, first_token: int, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Adds logits of both models.

        Args:
            positions: of the logits.
            first_token: the first token they are for.
            ours: of the first model, float32 [positions, tokens].
            theirs: of the second.
        """
        for side, logits in enumerate((ours, theirs)):
            value, place = logits.max(1)
            higher = value > self._best[side, positions]
            self._token[side, positions] = torch.where(higher, place + first_token, self._token[side, positions])
            self._best[side, positions] = self._best[side, positions].maximum(value)
            self._add_exponentials(side, positions, logits, ours - theirs if side == 0 else None)
            self._take_labels(side, positions, first_token, logits)

    def _add_exponentials(self, side: int, positions: slice, logits: torch.Tensor, apart: torch.Tensor | None) -> None:
        before = self._largest[side, positions]
        largest = before.maximum(logits.max(1).values.double())
        shrink = (before - largest).exp()
        weight = (logits.double() - largest[:, None]).exp_()
        self._largest[side, positions] = largest
        self._sums[side, positions] = self._sums[side, positions] * shrink + weight.sum(1)
        if apart is not None:
            self._apart[positions] = self._apart[positions] * shrink + weight.mul_(apart).sum(1)

    def _take_labels(self, side: int, positions: slice, first_token: int, logits: torch.Tensor) -> None:
        place = self._labels[positions] - first_token
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self._label_logits[side, positions] += found.where(inside, 0.0)

    def top1_agreement(self) -> float:
        """Share of positions with the same argmax token."""
        return float((self._token[0] == self._token[1]).float().mean())

    def divergence(self) -> Divergence:
        """What the sums say, once all logits were added."""
        log_sums = self._largest + self._sums.log()
        # E_p[log p - log q] = E_p[a - b] - log Z_a + log Z_b
        apart = self._apart / self._sums[0] - log_sums[0] + log_sums[1]
        apart = torch.where(apart < 0, 0.0, apart)  # rounding; NaN stays
        followed = self._labels >= 0
        losses = (log_sums - self._label_logits)[:, followed]
        perplexity = losses.mean(1).exp() if int(followed.sum()) else torch.full((2,), torch.nan)
        return Divergence(float(apart.mean()), float(apart.max()), float(perplexity[0]), float(perplexity[1]))


def position_blocks(positions: int, tokens: int) -> list[slice]:
    """Positions whose logits for a number of tokens are computed together."""
    step = max(1, _VALUES // max(1, tokens))
    return [slice(start, min(positions, start + step)) for start in range(0, positions, step)]


def labels_of(prompts: list[torch.Tensor]) -> torch.Tensor:
    """The token that follows each token of the prompts, int64 [tokens of all]; -1 at the end of a prompt."""
    end = torch.tensor([-1])
    return torch.cat([torch.cat([tokens[1:].cpu(), end]) for tokens in prompts])
