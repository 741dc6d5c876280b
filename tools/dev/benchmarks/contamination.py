"""``mq bench contamination``: 100 million tokens of a run searched for the items of a test, against a minute."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.evaluation.contamination import NGRAM
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.evaluation.search import Item, WhatWasRead, search

_LIMIT_S = 60.0
_DOCUMENTS, _LENGTH, _SEQUENCE = 4_120, 25_000, 4096
_TOKENS = 100_000_000
_ITEMS, _ITEM_TOKENS = 14_042, 120  # as many as MMLU's test has


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Ten of the items are in what the run has read; they must be found, and no other.

    Args:
        rounds: searches.
    """
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        dice = np.random.default_rng(0)
        with TokenFileWriter(Path(folder) / "a", vocab_size=151_665) as writer:
            for _ in range(_DOCUMENTS):
                writer.add(dice.integers(0, 151_643, _LENGTH))
        config = RECIPES["qwen2_5_0_5b"]().with_section("data", path=str(Path(folder) / "a"), seq_length=_SEQUENCE)
        samples = _TOKENS // _SEQUENCE
        data = TrainingData(config)
        data.at(0)
        read = WhatWasRead(config, data.state(samples))
        items = [Item("t", number, dice.integers(0, 151_643, _ITEM_TOKENS).tolist()) for number in range(_ITEMS)]
        places = [int(place) for place in np.linspace(0, samples - 1, 10)]
        for number, place in enumerate(places):
            (_, _, tokens), *_ = read.samples(place, place + 1)
            items[number] = Item("t", number, tokens[100 : 100 + _ITEM_TOKENS].tolist())
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            found = search(read, items, ngram=NGRAM, workers=workers)
            seconds.append(time.perf_counter() - started)
            assert sorted(found) == list(range(len(places))), found
    conditions = f"{samples:,} samples of {_SEQUENCE}, {_ITEMS:,} items, {workers} processes, {rounds} rounds"
    return [against_limit("search of 100M tokens", seconds, limit=_LIMIT_S, unit="s", conditions=conditions)]
