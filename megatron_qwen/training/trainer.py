"""The loop: counts, steps, calls."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_qwen import device
from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import Request
from megatron_qwen.data.reading.training_data import StageReader
from megatron_qwen.errors import NumericsError
from megatron_qwen.optim.build import set_learning_rate
from megatron_qwen.optim.schedule import learning_rate
from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.setup import Parts
from megatron_qwen.training.step import StepResult, train_step


@dataclass(frozen=True)
class StepRecord:
    """A step as the callbacks see it.

    Args:
        iteration: number of the step, from 1.
        result: loss, gradient norm, tokens, whether it was skipped.
        learning_rate: of this step.
        global_batch_size: sequences of this step.
        step_time_s: wall time, device work included.
        data_wait_s: of that, the time in which the step waited for its batches.
        stage: of the blend.
        config: what held for the step.
        extra: what callbacks add for the metrics.
    """

    iteration: int
    result: StepResult
    learning_rate: float
    global_batch_size: int
    step_time_s: float
    data_wait_s: float
    stage: str
    config: RunConfig
    extra: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Runs steps until the configuration's last one, or until a callback stops it.

    Args:
        parts: what a step needs.
        callbacks: features, called in this order.
    """

    def __init__(self, parts: Parts, callbacks: Sequence[Callback]) -> None:
        self.parts, self.callbacks = parts, callbacks
        self.exit_code: int | None = None
        # Seconds in each callback after the steps so far, by the name of its class.
        self.callback_seconds: dict[str, float] = dict.fromkeys((type(one).__name__ for one in callbacks), 0.0)

    def stop(self, exit_code: int) -> None:
        """Ends the loop after this step; the process will exit with this code."""
        self.exit_code = exit_code if self.exit_code is None else self.exit_code

    def fit(self) -> int:
        """Trains.

        Returns:
            The exit code: 0 when the last step is done, else what a callback stopped with.
        """
        last = self.parts.config.training.train_iters
        try:
            for callback in self.callbacks:
                callback.before_training(self)
            while self.parts.progress.iteration < last and self.exit_code is None:
                self.call_after_step(self.step())
            for callback in self.callbacks:
                with self._clock(callback):
                    callback.after_training(self)
        except NumericsError:
            for callback in self.callbacks:
                callback.on_numerics_error()
            raise
        finally:
            self.parts.loader.close()
            for callback in self.callbacks:
                callback.close()
        return self.exit_code or 0

    def call_after_step(self, record: StepRecord) -> None:
        """Hands a step to the callbacks, on the clock."""
        for callback in self.callbacks:
            with self._clock(callback):
                callback.after_step(self, record)

    @contextmanager
    def _clock(self, callback: Callback) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.callback_seconds[type(callback).__name__] += time.perf_counter() - started

    def step(self) -> StepRecord:
        """Takes one step and moves the progress on, without the callbacks."""
        parts, config, progress = self.parts, self.parts.config, self.parts.progress
        reader = parts.data.at(progress.consumed_samples)
        parts.model.set_rotary_base(reader.config.model.rotary_base)
        batch = global_batch_size(progress.consumed_samples, reader.config.training)
        rate = learning_rate(
            progress.schedule_iteration + 1, optim=config.optim, train_iters=config.training.train_iters
        )
        set_learning_rate(parts.optimizer, rate, weight_decay=config.optim.weight_decay)
        started = time.perf_counter()
        batches = parts.loader.load(reader, self._request(progress.consumed_samples, reader), self._upcoming)
        waited = time.perf_counter() - started
        result = train_step(reader.config, parts.model, parts.optimizer, parts.groups, parts.forward_step, batches)
        device.synchronize()
        elapsed = time.perf_counter() - started
        progress.iteration += 1
        progress.consumed_samples += batch
        progress.consumed_tokens += batch * reader.seq_length
        parts.data.forget(progress.consumed_samples)
        if result.skipped:
            progress.skipped_iterations += 1
            progress.consecutive_skips += 1
        else:
            progress.schedule_iteration += 1
            progress.consecutive_skips = 0
        return StepRecord(
            progress.iteration,
            result,
            rate,
            batch,
            elapsed,
            data_wait_s=waited,
            stage=reader.stage.name,
            config=reader.config,
        )

    def _request(self, consumed: int, reader: StageReader) -> Request:
        training = reader.config.training
        return Request(consumed, global_batch_size(consumed, training), training.micro_batch_size)

    def _upcoming(self) -> Iterator[tuple[StageReader, Request]]:
        """The steps after the one that begins, as far as anybody asks."""
        progress, config = self.parts.progress, self.parts.config
        consumed = progress.consumed_samples
        request = self._request(consumed, self.parts.data.at(consumed))
        for _ in range(progress.iteration + 1, config.training.train_iters):
            consumed += request.global_batch_size
            reader = self.parts.data.at(consumed)
            request = self._request(consumed, reader)
            yield reader, request
