"""``mq bench layer``: a dense and a sparse layer, forward and backward, against transformers' of the same shape."""

import os

from tools.benchmarks.layer_workers import BATCH, SEQUENCE
from tools.benchmarks.rows import BenchmarkRow
from tools.benchmarks.turns import Worker, comparison, in_turns

_CALLS = 8
_PEERS = {"dense": "transformers Qwen2DecoderLayer", "moe": "transformers Qwen3MoeDecoderLayer, 4 of 16 experts"}


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Both sides in turn, dense and sparse, fp32 and bf16.

    Args:
        rounds: turns of each side that count.
    """
    threads = len(os.sched_getaffinity(0))
    rows = []
    for kind, peer in _PEERS.items():
        for dtype in ("fp32", "bf16"):
            sides = [
                Worker("tools.benchmarks.layer_workers", [side, kind, dtype, str(threads)], threads=threads)
                for side in ("ours", "transformers")
            ]
            seconds = in_turns(sides[0], sides[1], rounds=rounds, calls=_CALLS)
            row = comparison(
                f"layer {kind} {dtype}",
                seconds,
                tokens=_CALLS * BATCH * SEQUENCE,
                peer=peer + (", bf16 autocast" if dtype == "bf16" else ""),
                required=1.0,
                conditions=f"{threads} threads, {rounds} rounds of {_CALLS} passes",
            )
            rows.append(row)
    return rows
