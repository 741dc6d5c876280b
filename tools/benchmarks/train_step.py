"""``mq bench train_step``: tokens per second of a training step against transformers with fused AdamW."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.benchmarks.rows import Row
from tools.benchmarks.train_step_workers import BATCH, SEQUENCE, bench_config

_SIDES = ("ours", "transformers")


class Worker:
    """One side as a process that waits for work between its turns.

    Args:
        side: ``ours`` or ``transformers``.
        dtype: ``fp32`` or ``bf16``.
        data_path: token file prefix.
        threads: CPU threads.
    """

    def __init__(self, side: str, dtype: str, data_path: Path, threads: int) -> None:
        # Idle threads must not spin while it is the other side's turn.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
        }
        command = [
            sys.executable,
            "-P",
            "-m",
            "tools.benchmarks.train_step_workers",
            side,
            dtype,
            str(data_path),
            str(threads),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._expect_ready()

    def _expect_ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            if line.strip() == "ready":
                return
        raise RuntimeError(self._process.stderr.read())

    def run(self, steps: int) -> tuple[float, float]:
        """Runs steps; returns their seconds and the last loss."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        seconds, loss = self._process.stdout.readline().split()
        return float(seconds), float(loss)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextmanager
def toy_tokens() -> Iterator[Path]:
    """A token file of random ids; speed does not depend on what they say."""
    import numpy as np

    from megatron_qwen.data.token_file import TokenFileWriter

    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "tokens"
        vocabulary = bench_config("fp32").model.vocab_size
        with TokenFileWriter(prefix, vocab_size=vocabulary) as writer:
            generator = np.random.default_rng(0)
            for _ in range(64):
                writer.add(generator.integers(0, vocabulary, 8 * SEQUENCE).tolist())
        yield prefix


def run(*, rounds: int, steps: int) -> list[Row]:
    """Both sides in turn, round by round, in fp32 and in bf16.

    Args:
        rounds: turns of each side that count, after one that does not.
        steps: training steps in a turn.

    Returns:
        A row per precision; ``ratio`` is the median over rounds of ours / theirs in tokens per second.
    """
    threads = len(os.sched_getaffinity(0))
    rows = []
    with toy_tokens() as data:
        for dtype in ("fp32", "bf16"):
            workers = {side: Worker(side, dtype, data, threads) for side in _SIDES}
            seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
            for side in _SIDES:
                workers[side].run(max(2, steps // 2))
            for number in range(rounds):
                for side in _SIDES if number % 2 == 0 else reversed(_SIDES):
                    seconds[side].append(workers[side].run(steps)[0])
            for worker in workers.values():
                worker.close()
            tokens = steps * BATCH * SEQUENCE
            ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
            rows.append(
                Row(
                    benchmark=f"train_step {dtype}",
                    ours=tokens / statistics.median(seconds["ours"]),
                    against=tokens / statistics.median(seconds["transformers"]),
                    unit="tokens/s",
                    peer="transformers Qwen2ForCausalLM, fused AdamW" + (", bf16 autocast" if dtype == "bf16" else ""),
                    ratio=statistics.median(ratios),
                    ratio_min=min(ratios),
                    ratio_max=max(ratios),
                    required=1.0,
                    conditions=f"{threads} threads, {rounds} rounds of {steps} steps",
                )
            )
    return rows
