"""``mq bench card``: what the performance card and the trainer's clock cost a step, against 1 %."""

import os
import tempfile
import time
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.dev.benchmarks.train_step import toy_tokens
from tools.dev.benchmarks.train_step_workers import bench_config

_LIMIT = 0.01
_CALLS = 2000
# Of a run: as many as training/callbacks/build.py lists without the card, and the card.
_CALLBACKS = 9


def run(*, rounds: int) -> list[BenchmarkRow]:
    """The share of a step of the 15.7M model that goes into keeping the card.

    Args:
        rounds: steps that are timed.
    """
    from megatron_qwen import device
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    from megatron_qwen.distributed.rank import RankInfo, join, leave
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.base import Callback
    from megatron_qwen.training.callbacks.performance import Performance
    from megatron_qwen.training.trainer import Trainer

    device.set_threads(len(os.sched_getaffinity(0)))
    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    with toy_tokens() as data, tempfile.TemporaryDirectory() as folder:
        card = Performance(Path(folder) / "performance.json", attempt=1, started=time.time(), resumed_at=0)
        trainer = Trainer(build_components(bench_config("fp32", str(data))), [Callback() for _ in range(_CALLBACKS)])
        card.before_training(trainer)
        record = trainer.step()
        steps = []
        for _ in range(rounds):
            started = time.perf_counter()
            trainer.step()
            steps.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(_CALLS):
            trainer.call_after_step(record)
            card.after_step(trainer, record)
        cost = (time.perf_counter() - started) / _CALLS
        card.close()
    leave()
    shares = [cost / step for step in steps]
    conditions = f"{cost * 1e6:.0f} us of {min(steps):.2f} s and more, {rounds} steps, fp32"
    return [against_limit("performance card", shares, limit=_LIMIT, unit="of a step", conditions=conditions)]
