"""``mq bench stragglers``: what the comparison of ranks costs a step, against 1 %, and the scores of many ranks."""

import math
import tempfile
import time
from pathlib import Path

from megatron_qwen import device
from megatron_qwen.metrics.straggler_file import StragglerFile
from megatron_qwen.resilience.stragglers import RankTimes, StragglerScoring
from tools.dev.benchmarks.ranks import measure
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.dev.benchmarks.train_step import toy_tokens

_LIMIT = 0.01
_CPU_RANKS = 2
_RANKS, _WINDOWS = 1024, 40
# 1 % of five steps of a second each, which is short for a run on so many GPUs.
_WINDOW_LIMIT_S = 0.05


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Two rows: the share of a step of the 15.7M model, and the time of rank 0 for a window of 1,024 ranks.

    Args:
        rounds: steps that are timed.
    """
    ranks = device.count() or _CPU_RANKS
    with toy_tokens() as data:
        found = measure("tools.dev.benchmarks.stragglers_worker", [str(data), str(rounds)], ranks=ranks)
    shares = [found["cost_s"] / step for step in found["steps_s"]]
    told = f"{found['cost_s'] * 1e6:.0f} us of {min(found['steps_s']):.2f} s and more, {found['waits']} waits a step"
    conditions = f"{told}, {ranks} ranks, {device.device_name()}, {rounds} steps, fp32"
    windows = f"{_WINDOWS} windows, stragglers.jsonl included"
    return [
        against_limit("comparison of ranks", shares, limit=_LIMIT, unit="of a step", conditions=conditions),
        against_limit(f"scores of {_RANKS} ranks", _scoring(), limit=_WINDOW_LIMIT_S, unit="s", conditions=windows),
    ]


def _scoring() -> list[float]:
    """Seconds a window on rank 0, in four parts of the windows."""
    nodes = [f"node-{rank // 8:03d}" for rank in range(_RANKS)]
    scoring = StragglerScoring([rank % 4 for rank in range(_RANKS)], nodes, threshold=0.7, windows=3)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        file = StragglerFile(Path(folder) / "stragglers.jsonl", attempt=1, resumed_at=0, nodes=nodes)
        for window in range(_WINDOWS):
            times = [
                RankTimes(0.5 + 0.05 * math.sin(rank * window), 0.001, 0.002, 0.0, 0.3, 1.0) for rank in range(_RANKS)
            ]
            started = time.perf_counter()
            found = scoring.add(times, steps=5)
            figures = {"score": found.scores}
            figures |= {name: tuple(one[index] for one in times) for index, name in enumerate(RankTimes._fields[:5])}
            file.add(5 * (window + 1), figures)
            seconds.append(time.perf_counter() - started)
    quarter = _WINDOWS // 4
    return [sum(seconds[begin : begin + quarter]) / quarter for begin in range(0, _WINDOWS, quarter)]
