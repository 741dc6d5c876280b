"""``mq bench layer``: a dense and a sparse layer, forward and backward, against transformers' of the same shape."""

import os

from tools.dev.benchmarks.layer_workers import BATCH, SEQUENCE
from tools.dev.benchmarks.rows import BenchmarkRow
from tools.dev.benchmarks.turns import Worker, comparison, in_turns

_CALLS, _CALLS_OF_A_TRIAL = 8, 1
_PEERS = {"dense": "transformers Qwen2DecoderLayer", "moe": "transformers Qwen3MoeDecoderLayer, 4 of 16 experts"}


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Both sides in turn, dense and sparse, fp32 and bf16.

    Args:
        rounds: turns of each side that count; one is a trial, whose turn is a single pass on one thread.
    """
    calls, threads = (_CALLS, len(os.sched_getaffinity(0))) if rounds > 1 else (_CALLS_OF_A_TRIAL, 1)
    rows = []
    for kind, peer in _PEERS.items():
        for dtype in ("fp32", "bf16"):
            sides = [
                Worker("tools.dev.benchmarks.layer_workers", [side, kind, dtype, str(threads)], threads=threads)
                for side in ("ours", "transformers")
            ]
            seconds = in_turns(sides[0], sides[1], rounds=rounds, calls=calls)
            row = comparison(
                f"layer {kind} {dtype}",
                seconds,
                tokens=calls * BATCH * SEQUENCE,
                peer=peer + (", bf16 autocast" if dtype == "bf16" else ""),
                required=1.0,
                conditions=f"{threads} threads, {rounds} rounds of {calls} passes",
            )
            rows.append(row)
    return rows
