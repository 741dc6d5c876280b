"""Searches what a run has read for the items of tests, in several processes, each of which imports this alone."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.replay import Replay
from megatron_qwen.evaluation.contamination import Overlap, TestIndex, Tokens, longest, merged
from tools.generation.progress import RequestProgress

_TOKENS_A_PART = 4 << 20


@dataclass(frozen=True)
class Item:
    """An item of a test.

    Args:
        task: that has it.
        doc_id: its number there.
        tokens: of its text with the right answer.
    """

    task: str
    doc_id: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class WhatWasRead:
    """What a run has read.

    Args:
        config: of the run.
        ledger: of its checkpoint.
    """

    config: RunConfig
    ledger: Mapping[str, Any]

    @cached_property
    def _replay(self) -> Replay:
        """One for all that a process reads: it finds a sample by going on from the one before."""
        return Replay(self.config, self.ledger)

    def samples(self, begin: int, stop: int) -> Iterator[tuple[int, str, Tokens]]:
        """Number, source and tokens, those that are only predicted included."""
        for number in range(begin, stop):
            source, _, sample = self._replay[number]
            tokens = sample.tokens[: len(sample.tokens) - sample.padding]
            if not sample.padding and sample.labels[-1] >= 0:
                tokens = np.append(tokens, sample.labels[-1])
            yield number, source, tokens


def search(read: WhatWasRead, items: Sequence[Item], *, ngram: int, workers: int) -> dict[int, Overlap]:
    """The longest run of each item, by its place in ``items``."""
    phases = [(entry["first_sample"], entry["samples"], entry["seq_length"]) for entry in read.ledger["phases"]]
    parts = []
    for first, count, length in phases:
        step = max(1, _TOKENS_A_PART // length)
        parts += [(begin, min(begin + step, first + count)) for begin in range(first, first + count, step)]
    progress, done, found = RequestProgress("samples"), 0, []
    total = sum(count for _, count, _ in phases)
    texts = [(item.task, item.tokens) for item in items]
    used, begin_with = max(1, min(workers, len(parts))), (WhatWasRead(read.config, read.ledger), texts, ngram)
    with ProcessPoolExecutor(used, get_context("spawn"), initializer=_begin, initargs=begin_with) as pool:
        for (begin, stop), part in zip(parts, pool.map(_part, parts), strict=True):
            found.append(part)
            done += stop - begin
            progress(done, total)
    progress.close()
    return merged(found)


_state: dict[str, Any] = {}


def _begin(read: WhatWasRead, texts: Sequence[tuple[str, Sequence[int]]], ngram: int) -> None:
    index = TestIndex([tokens for _, tokens in texts], tests=[task for task, _ in texts], ngram=ngram)
    _state.update(read=read, index=index)


def _part(bounds: tuple[int, int]) -> dict[int, Overlap]:
    return longest(_state["index"], _state["read"].samples(*bounds))
