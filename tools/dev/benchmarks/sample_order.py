"""``mq bench sample_order``: the first sample of a source of 10^12 tokens, and the memory that its order takes."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.dev.benchmarks.sparse_tokens import write_sparse

_LIMIT_MS, _LIMIT_MIB = 10.0, 16.0


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Opens the source in a new process each round; reading its pages for the first time is part of it."""
    milliseconds, mebibytes = [], []
    with tempfile.TemporaryDirectory() as directory:
        prefix = write_sparse(Path(directory) / "tokens", documents=1000, length=10**9)
        for _ in range(rounds):
            command = [sys.executable, "-P", "-m", "tools.dev.benchmarks.sample_order", str(prefix)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            milliseconds.append(float(printed[0]))
            mebibytes.append(max(float(printed[1]), 1 / 1024))
    conditions = f"10^12 tokens, sequence 4096, {rounds} rounds"
    return [
        against_limit("first sample", milliseconds, limit=_LIMIT_MS, unit="ms", conditions=conditions),
        against_limit("memory of 1000 samples", mebibytes, limit=_LIMIT_MIB, unit="MiB", conditions=conditions),
    ]


def private_mib() -> float:
    """Memory of this process's own; pages of a mapped file are the kernel's, to drop when it likes."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1024


def _measure(prefix: str) -> None:
    """Prints the milliseconds to the first sample and by how many MiB the process grew over 1000."""
    from megatron_qwen.data.reading.training_data import TrainingData
    from megatron_qwen.recipes.registry import RECIPES

    before, started = private_mib(), time.perf_counter()
    config = RECIPES["qwen2_5_0_5b"]().with_section("data", path=prefix, seq_length=4096, validation_fraction=0.0)
    source = TrainingData(config).at(0)
    source[0]
    elapsed = time.perf_counter() - started
    for index in range(1000):
        source[index]
    print(1000 * elapsed, private_mib() - before)


if __name__ == "__main__":
    _measure(sys.argv[1])
