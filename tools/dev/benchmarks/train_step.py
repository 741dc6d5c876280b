"""``mq bench train_step``: tokens per second of a training step against transformers with fused AdamW."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow
from tools.dev.benchmarks.train_step_workers import BATCH, SEQUENCE, bench_config
from tools.dev.benchmarks.turns import Worker, comparison, in_turns

_WORKERS = "tools.dev.benchmarks.train_step_workers"
_REQUIRED = 1.25  # times the peer, chosen by hand; benchmarks/results has 1.27 in fp32 and 1.40 in bf16


@contextmanager
def toy_tokens() -> Iterator[Path]:
    """A token file of random ids; speed does not depend on what they say."""
    import numpy as np

    from megatron_qwen.data.token_files.token_file import TokenFileWriter

    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "tokens"
        vocabulary = bench_config("fp32").model.vocab_size
        with TokenFileWriter(prefix, vocab_size=vocabulary) as writer:
            generator = np.random.default_rng(0)
            for _ in range(64):
                writer.add(generator.integers(0, vocabulary, 8 * SEQUENCE).tolist())
        yield prefix


def run(*, rounds: int, steps: int) -> list[BenchmarkRow]:
    """Both sides in turn, round by round, in fp32 and in bf16.

    Args:
        rounds: turns of each side that count, after one that does not.
        steps: training steps in a turn.
    """
    threads = len(os.sched_getaffinity(0))
    rows = []
    with toy_tokens() as data:
        for dtype in ("fp32", "bf16"):
            sides = [
                Worker(_WORKERS, [side, dtype, str(data), str(threads)], threads=threads)
                for side in ("ours", "transformers")
            ]
            seconds = in_turns(sides[0], sides[1], rounds=rounds, calls=steps)
            autocast = ", bf16 autocast" if dtype == "bf16" else ""
            row = comparison(
                f"train_step {dtype}",
                seconds,
                tokens=steps * BATCH * SEQUENCE,
                peer=f"transformers Qwen2ForCausalLM, fused AdamW{autocast}",
                required=_REQUIRED,
                conditions=f"{threads} threads, {rounds} rounds of {steps} steps",
            )
            rows.append(row)
    return rows
