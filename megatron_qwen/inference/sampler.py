"""Chooses tokens from logits: penalties, temperature, top-k, top-p, noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_qwen.inference.noise import gumbel
from megatron_qwen.inference.request import Sampling


@dataclass(frozen=True)
class Row:
    """A sequence whose next token is to be chosen.

    Args:
        sampling: how.
        key: of its noise (``noise.stream_key``).
        position: of the token.
        before: prompt and answer so far.
        prompt_length: tokens of the prompt in it.
    """

    sampling: Sampling
    key: int
    position: int
    before: Sequence[int]
    prompt_length: int


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every sequence.

    Args:
        logits: of the whole vocabulary, [n, v], fp32.
        rows: n sequences.
    """
    plain = [row.sampling.temperature == 0 and not row.sampling.has_penalties for row in rows]
    found = logits.argmax(dim=1).tolist()
    for index, (row, done) in enumerate(zip(rows, plain, strict=True)):
        if not done:
            found[index] = _choose_one(logits[index], row)
    return found


def _choose_one(logits: torch.Tensor, row: Row) -> int:
    sampling = row.sampling
    scores = logits.double()
    if sampling.has_penalties:
        scores = _penalised(scores, row)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = _filtered(scores / sampling.temperature, sampling)
    noise = gumbel(row.key, row.position, 0, len(scores), device=scores.device)
    return int((scores + noise).argmax())


def _penalised(scores: torch.Tensor, row: Row) -> torch.Tensor:
    """A copy with the penalties of tokens that were there; one that was there often counts once."""
    scores = scores.clone()
    sampling, place = row.sampling, scores.device
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.before)), device=place)
        values = scores[seen]
        factor = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / factor, values * factor)
    answered = sorted(set(row.before[row.prompt_length :]))
    if sampling.presence_penalty and answered:
        scores[torch.tensor(answered, device=place)] -= sampling.presence_penalty
    return scores


def _filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """-inf for tokens that top-k and then top-p exclude, as transformers orders them.

    Of equal logits at the limit of top-k all stay; of top-p the token that reaches the limit stays.
    """
    if 0 < sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(0)
        before = probabilities.cumsum(0) - probabilities
        scores = scores.masked_fill(
            torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[before >= sampling.top_p], True),
            float("-inf"),
        )
    return scores
