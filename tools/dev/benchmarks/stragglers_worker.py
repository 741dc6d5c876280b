"""A rank of ``mq bench stragglers``: times steps, and by itself everything that a step does for the comparison."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_qwen import device
from megatron_qwen.config.resilience import ResilienceConfig
from megatron_qwen.core_patches.install import prepare_process
from tools.dev.benchmarks.train_step_workers import BATCH, bench_config

_CALLS = 1000


def main(data: str, rounds: int) -> dict[str, Any]:
    """Seconds of each step, and of the comparison in a step: its share of a window's message and scores included."""
    prepare_process()
    import torch.distributed as dist

    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.stragglers import Stragglers
    from megatron_qwen.training.step_clock import StepClock
    from megatron_qwen.training.trainer import Trainer

    info = RankInfo.from_environment()
    join(info, timeout_minutes=10)
    config = bench_config("fp32", data).with_section("training", global_batch_size=BATCH * info.world_size)
    trainer, clock = Trainer(build_components(config), []), StepClock()
    settings, world = ResilienceConfig(), dist.group.WORLD
    assert world is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stragglers.jsonl"
        callback = Stragglers(settings, group=world, path=path, attempt=1, resumed_at=0)
        callback.before_training(trainer)
        record, waits, steps = trainer.step(), 0, []
        for _ in range(rounds):
            before, started = _waits(), time.perf_counter()
            record = trainer.step()
            steps.append(time.perf_counter() - started)
            waits = _waits() - before
        numbers = iter(range(record.iteration + 1, sys.maxsize))
        callback.after_step(trainer, record)

        def after_step() -> None:
            callback.after_step(trainer, replace(record, iteration=next(numbers)))

        dist.barrier()
        cost = _seconds(after_step) + 2 * _seconds(clock.read) + waits * _cost_of_a_wait()
        callback.close()
    dist.destroy_process_group()
    return {"cost_s": cost, "steps_s": steps, "waits": waits}


def _waits() -> int:
    from megatron_qwen.core_patches import timed_waits

    clock = timed_waits.clock()
    return 0 if clock is None else clock.calls


def _cost_of_a_wait() -> float:
    """What the clock adds to a wait; on a GPU waits are not timed."""
    from megatron_qwen.core_patches import timed_waits

    wait = timed_waits.timed(lambda work: True)
    return 0.0 if device.has_cuda() else _seconds(lambda: wait(None))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - started) / _CALLS


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
