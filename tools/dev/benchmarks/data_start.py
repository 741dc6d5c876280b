"""``mq bench data_start``: from nothing to the first batch over 2,000 sources, against megatron-core's GPTDataset."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.dev.benchmarks.sample_order import private_mib
from tools.dev.benchmarks.sparse_tokens import write_sparse

_SOURCES, _DOCUMENTS, _LENGTH = 2000, 500, 10**6
_MOST_S, _MOST_MIB = 2.0, 200.0
# What megatron-core can do in a benchmark: one source of 2 x 10^9 tokens.
_CORE_DOCUMENTS, _CORE_LENGTH = 2_000_000, 1_000


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Every measurement is a process of its own; imports are left out on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(_SOURCES):
            write_sparse(root / f"source_{number:04d}", documents=_DOCUMENTS, length=_LENGTH)
        blend = root / "blend.yaml"
        names = [f"source_{number:04d}" for number in range(_SOURCES)]
        weights = {name: 1.0 + number % 7 for number, name in enumerate(names)}
        content = {"sources": {name: {"path": name} for name in names}, "stages": [{"name": "s", "weights": weights}]}
        blend.write_text(yaml.safe_dump(content))
        many = [_answer("blend", blend) for _ in range(rounds)]
        one = write_sparse(root / "one", documents=_CORE_DOCUMENTS, length=_CORE_LENGTH)
        ours, core = [], []
        for turn in range(rounds):
            ours.append(_answer("path", one)[0])
            core.append(_answer("core", one, root / f"cache_{turn}")[0])
    conditions = f"{_SOURCES} sources, 10^12 tokens, batch of 8 x 4096, {rounds} rounds"
    ratios = [b / a for a, b in zip(ours, core, strict=True)]
    return [
        against_limit("first batch", [row[0] for row in many], limit=_MOST_S, unit="s", conditions=conditions),
        against_limit("memory", [row[1] for row in many], limit=_MOST_MIB, unit="MiB", conditions=conditions),
        BenchmarkRow(
            "first batch of 2 x 10^9 tokens in 2 x 10^6 documents",
            statistics.median(ours),
            statistics.median(core),
            "s",
            "megatron-core GPTDataset, index built",
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            1.0,
            f"{rounds} rounds",
        ),
    ]


def _answer(*arguments: object) -> list[float]:
    command = [sys.executable, "-P", "-m", "tools.dev.benchmarks.data_start", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-2:]]


def _measure(field: str, path: str) -> None:
    """Prints seconds to the first batch and the MiB that the process grew by."""
    import torch

    from megatron_qwen.data.loaders.batches import BatchRequest, BatchSlice, micro_batches
    from megatron_qwen.data.reading.training_data import TrainingData
    from megatron_qwen.recipes.registry import RECIPES

    batch_slice = BatchSlice(0, 1, 0, 1, torch.device("cpu"))
    config = RECIPES["qwen2_5_0_5b"]().with_section("data", **{field: path})
    before, started = private_mib(), time.perf_counter()
    reader = TrainingData(config).at(0)
    batches = list(micro_batches(reader, batch_slice, BatchRequest(0, 8, 8)))
    elapsed = time.perf_counter() - started
    assert batches[0].tokens.shape == (8, 4096)
    print(elapsed, private_mib() - before)


def _measure_core(path: str, cache: str) -> None:
    """The same of megatron-core, one rank."""
    from typing import Any

    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from torch._C._distributed_c10d import HashStore

    assert Split
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    settings: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": 4096,
        "blend": ([path], None),
        "split": "1,0,0",
        "path_to_cache": cache,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "tokenizer": _NoTokenizer(),
        "mid_level_dataset_surplus": 0.005,
    }
    started = time.perf_counter()
    config = GPTDatasetConfig(**settings)
    samples = _CORE_DOCUMENTS * _CORE_LENGTH // 4096 - 1
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
    dataset[0]
    print(time.perf_counter() - started, 0.0)


class _NoTokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, bos, vocab_size = 0, -1, -1, 65_536
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 (megatron-core's name)


if __name__ == "__main__":
    if sys.argv[1] == "core":
        _measure_core(*sys.argv[2:])
    else:
        _measure(*sys.argv[1:])
