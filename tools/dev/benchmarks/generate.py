"""``mq bench generate``: prompts computed and tokens generated a second, against transformers' generate."""

import os
import statistics

from tools.dev.benchmarks.generate_workers import NEW, PROMPT
from tools.dev.benchmarks.rows import BenchmarkRow, against_peer
from tools.dev.benchmarks.turns import Worker

_WORKERS = "tools.dev.benchmarks.generate_workers"
_CACHES = ("dynamic", "static")
_REQUIRED = {1: 1.0, 8: 1.5, 32: 1.5}  # of decoding, by batch; prompts need as much


def run(*, rounds: int) -> list[BenchmarkRow]:
    """A row for prompts and one for decoding, by batch; of the peer's caches the one with the faster median counts.

    The faster of two in every round would be faster than either: on a shared machine rounds differ by a fifth.

    Args:
        rounds: turns of every side that count, after one that does not.
    """
    threads = len(os.sched_getaffinity(0))
    rows = []
    for batch, required in _REQUIRED.items():
        sides = {
            (side, new): Worker(_WORKERS, [side, str(batch), str(new)], threads=threads)
            for side in ("ours", *_CACHES)
            for new in (1, NEW)
        }
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in sides}
        for worker in sides.values():
            worker.run(1)
        for _ in range(rounds):
            for key, worker in sides.items():
                seconds[key].append(worker.run(1))
        for worker in sides.values():
            worker.close()
        told = f"batch {batch}, prompts of {PROMPT} tokens, {NEW} new ones, fp32, {threads} threads, {rounds} rounds"
        first = {side: seconds[side, 1] for side in ("ours", *_CACHES)}
        # What the first token takes is taken off, round by round.
        more = {
            side: [whole - one for whole, one in zip(seconds[side, NEW], seconds[side, 1], strict=True)]
            for side in ("ours", *_CACHES)
        }
        rows.append(_row(f"prompts, batch {batch}", first, batch * PROMPT, required, told))
        rows.append(_row(f"decoding, batch {batch}", more, batch * (NEW - 1), required, told))
    return rows


def _row(name: str, seconds: dict[str, list[float]], tokens: int, required: float, told: str) -> BenchmarkRow:
    peer = min((seconds[cache] for cache in _CACHES), key=statistics.median)
    return against_peer(
        name,
        [theirs / ours for ours, theirs in zip(seconds["ours"], peer, strict=True)],
        ours=tokens / statistics.median(seconds["ours"]),
        against=tokens / statistics.median(peer),
        unit="tokens/s",
        peer="transformers' generate, the faster of its dynamic and its static cache",
        required=required,
        conditions=told,
    )
