"""``mq bench integrity``: what the checks of weights, optimizer state and spikes cost a step, against 1 %."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.dev.benchmarks.train_step import toy_tokens
from tools.dev.benchmarks.train_step_workers import bench_config

_LIMIT = 0.01


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Shares of a step of the 15.7M model (2,048 tokens, one rank) at the default settings, on this machine's device.

    Hashing costs the same whatever the batch, so the share falls with the tokens of a rank. On a CPU it is the CPU time
    of one thread, which other programs of the machine change little; hashes use one thread, so with n threads the share
    is up to n times as large.

    Args:
        rounds: steps that are timed, and rounds of the checks.
    """
    from megatron_qwen import device
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    from megatron_qwen.distributed import groups
    from megatron_qwen.distributed.rank import RankInfo, join, leave
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.build import build_integrity
    from megatron_qwen.training.integrity.rerun import StepGuard
    from megatron_qwen.training.trainer import Trainer

    device.set_threads(1)
    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    rows = []
    with toy_tokens() as data:
        for dtype in ("fp32", "bf16"):
            components = build_components(bench_config(dtype, str(data)))
            trainer = Trainer(components, [])
            record = trainer.step()
            steps = [_seconds(trainer.step) for _ in range(rounds)]
            calls = {
                "weights and optimizer state": partial(_check, build_integrity(components), trainer, record),
                "spikes": partial(_look, StepGuard(components), record),
            }
            for name, call in calls.items():
                call()
                costs = [_seconds(call) for _ in range(rounds)]
                shares = [cost / step for cost, step in zip(costs, steps, strict=True)]
                conditions = f"{min(costs) * 1e6:,.0f} us of {min(steps):.3f} s and more, {device.device_name()}"
                rows.append(
                    against_limit(f"{name}, {dtype}", shares, limit=_LIMIT, unit="of a step", conditions=conditions)
                )
            groups.destroy()
    leave()
    return rows


def _check(integrity: Any, trainer: Any, record: Any) -> None:
    """As a step does: before its update, and after it."""
    from megatron_qwen import device

    integrity.before_optimizer_step(trainer)
    integrity.after_step(trainer, record)
    device.synchronize()


def _look(guard: Any, record: Any) -> None:
    """At a step that is no spike: neither batches nor the computation of gradients are used."""
    guard.before_step(None)
    guard.examine(record.result, None)


def _seconds(call: Callable[[], object]) -> float:
    from megatron_qwen import device

    clock = time.perf_counter if device.has_cuda() else time.process_time
    started = clock()
    call()
    return clock() - started
