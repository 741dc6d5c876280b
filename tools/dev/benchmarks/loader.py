"""``mq bench loader``: batches of 4,096 tokens a sample out of a memory map, on one core."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_qwen.data.loaders.batches import BatchRequest, BatchSlice, micro_batches
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.rows import BenchmarkRow

_LEAST = 20e6
_DOCUMENTS, _LENGTH, _BATCH, _STEPS = 4_000, 25_000, 8, 150


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Reads and collates; the reading thread alone, pinned to one core."""
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        with TokenFileWriter(Path(folder) / "a", vocab_size=151_665) as writer:
            for _ in range(_DOCUMENTS):
                writer.add(random.integers(0, 151_643, _LENGTH))
        config = RECIPES["qwen2_5_0_5b"]().with_section("data", path=str(Path(folder) / "a"), seq_length=4096)
        batch_slice = BatchSlice(0, 1, 0, 1, torch.device("cpu"))
        speeds = []
        os.sched_setaffinity(0, {min(cores)})
        torch.set_num_threads(1)
        try:
            for turn in range(rounds + 1):
                reader = TrainingData(config).at(0)
                started = time.perf_counter()
                for step in range(_STEPS):
                    list(micro_batches(reader, batch_slice, BatchRequest(step * _BATCH, _BATCH, _BATCH)))
                if turn:  # the first turn brings the file into memory
                    speeds.append(_STEPS * _BATCH * 4096 / (time.perf_counter() - started))
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
    speeds.sort()
    middle = speeds[len(speeds) // 2]
    ratios = [speed / _LEAST for speed in speeds]
    conditions = f"one core, batches of {_BATCH} x 4096, {rounds} rounds"
    name = "loader, tokens read and collated"
    return [
        BenchmarkRow(name, middle, _LEAST, "tokens/s", "limit", middle / _LEAST, ratios[0], ratios[-1], 1.0, conditions)
    ]
