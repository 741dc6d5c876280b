"""Filters and penalties against transformers' logits processors."""

import pytest
import torch
import transformers

from megatron_qwen.inference.noise import gumbel, stream_key
from megatron_qwen.inference.request import Sampling
from megatron_qwen.inference.sampler import Row, choose

VOCABULARY = 97
PROMPT, ANSWER = [3, 5, 5, 8, 60], [2, 3, 44]
KEY = stream_key(0, PROMPT, 0)


def row(**options) -> Row:
    return Row(Sampling(**options), KEY, len(PROMPT + ANSWER), [*PROMPT, *ANSWER], len(PROMPT))


def drawn(seed: int) -> torch.Tensor:
    return 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def expected(logits: torch.Tensor, sampling: Sampling) -> int:
    """The token by transformers' processors and our noise."""
    ids = torch.tensor([[*PROMPT, *ANSWER]])
    scores = logits.double()
    if sampling.repetition_penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    for token in set(ANSWER) if sampling.presence_penalty else ():
        scores[0, token] -= sampling.presence_penalty
    if not sampling.temperature:
        return int(scores.argmax())
    scores = transformers.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(ids, scores)
    return int((scores[0] + gumbel(KEY, len(ids[0]), 0, VOCABULARY, device=scores.device)).argmax())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 2.5},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.3, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ],
)
def test_as_transformers_filters(options):
    for seed in range(50):
        logits = drawn(seed)
        assert choose(logits, [row(**options)]) == [expected(logits.clone(), Sampling(**options))]


def test_rows_do_not_meet():
    logits = torch.cat([drawn(seed) for seed in range(4)])
    rows = [row(), row(temperature=1.0), row(repetition_penalty=3.0), row(temperature=0.5, top_k=2)]
    assert choose(logits, rows) == [choose(logits[index : index + 1], [one])[0] for index, one in enumerate(rows)]
