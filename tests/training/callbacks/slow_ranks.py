"""Real ranks, one of them slow, as jobs of a pool."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from tests.rank_pool import RankPool

# SIGSTOP and SIGCONT alternate this often: several times in a step, so that a median of steps sees the average.
_PERIOD_S = 0.03


def train_with_slow_rank(config: RunConfig, run_dir: Path, slow: int | None, factor: float, begin: int) -> int:
    """Trains with the callbacks of a run; from step ``begin`` the slow rank computes ``factor`` times as much."""
    import torch
    import torch.distributed as dist

    from megatron_qwen.resilience.signals import StopSignals
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.base import Callback
    from megatron_qwen.training.callbacks.build import build_callbacks
    from megatron_qwen.training.trainer import Trainer

    class MoreWork(Callback):
        """Multiplies matrices for (factor - 1) times what the rest of the step took on a core."""

        def __init__(self) -> None:
            self.step_s, self.mark = 0.0, time.thread_time()

        def before_optimizer_step(self, trainer: Any) -> None:
            started = time.thread_time()
            matrix = torch.ones(64, 64)
            more = trainer.components.progress.iteration >= begin
            while more and time.thread_time() - started < (factor - 1) * self.step_s:
                matrix @ matrix
            self.mark += time.thread_time() - started

        def after_step(self, trainer: Any, record: Any) -> None:
            now = time.thread_time()
            self.step_s, self.mark = now - self.mark, now

    directory = RunDirectory(run_dir)
    components = build_components(config)
    callbacks = build_callbacks(
        components, directory, StopSignals(), attempt=1, started=time.time(), resumed_at=0, heartbeat=None
    )
    more = [MoreWork()] if dist.get_rank() == slow else []
    return Trainer(components, [*more, *callbacks]).fit()


def train_with_pauses(config: RunConfig, run_dir: Path, slow: int) -> int:
    """Trains; one rank sleeps 0.2 s before each of its steps."""
    import torch.distributed as dist

    from megatron_qwen.resilience.signals import StopSignals
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.build import build_callbacks
    from megatron_qwen.training.step_record import StepRecord
    from megatron_qwen.training.trainer import Trainer

    class Pausing(Trainer):
        """Sleeps on one rank."""

        def step(self) -> StepRecord:
            time.sleep(0.2 if dist.get_rank() == slow else 0.0)
            return super().step()

    components = build_components(config)
    callbacks = build_callbacks(
        components, RunDirectory(run_dir), StopSignals(), attempt=1, started=time.time(), resumed_at=0, heartbeat=None
    )
    return Pausing(components, callbacks).fit()


def leave_with_slow_rank(config: RunConfig, run_dir: Path, slow: int, factor: float) -> int:
    """The same under a job's controller, as far as a rank can tell."""
    job = {"MQ_ATTEMPT": "1", "SLURM_JOB_ID": "7"}
    os.environ.update(job)
    try:
        return train_with_slow_rank(config, run_dir, slow, factor, 0)
    finally:
        for name in job:
            del os.environ[name]


def pids(pool: RankPool) -> list[int]:
    """Process ids of the ranks, by rank."""
    return [int(pid) for pid in pool.run(os.getpid)]


@contextmanager
def stopped_most_of_the_time(pid: int, *, factor: float) -> Iterator[None]:
    """Another process has this one stopped, so that it runs one part in ``factor`` of the time."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(_PERIOD_S * (1 - 1 / factor))
            os.kill(pid, signal.SIGCONT)
            over.wait(_PERIOD_S / factor)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)


def named_in(records: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The first step at which each rank was named."""
    found: dict[int, int] = {}
    for record in records:
        for one in record.get("stragglers", ()):
            found.setdefault(one["rank"], record["iteration"])
    return found
