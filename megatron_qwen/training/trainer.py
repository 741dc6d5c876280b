"""The training loop: takes steps, counts them, and calls the callbacks."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from megatron_qwen import device
from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.data.loaders.batches import BatchRequest
from megatron_qwen.data.reading.training_data import StageReader
from megatron_qwen.errors import NumericsError, SilentCorruptionError, UserError
from megatron_qwen.optim.build import set_learning_rate
from megatron_qwen.optim.schedule import learning_rate
from megatron_qwen.training.callbacks.base import Callback, CallbackPhase, TimedAs
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.rerun import Guard, StepInputs
from megatron_qwen.training.step import train_step
from megatron_qwen.training.step_clock import StepClock
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)


class Trainer:
    """Runs steps until the configuration's last one, or until a callback stops it.

    Args:
        components: what a step needs.
        callbacks: features, called in this order.
        guard: looks at gradients before the update, and may compute them again; None takes every step as it is.
    """

    def __init__(
        self, components: TrainingComponents, callbacks: Sequence[Callback], *, guard: Guard | None = None
    ) -> None:
        self.components, self.callbacks, self.guard = components, callbacks, guard
        self.exit_code: int | None = None
        self._phase: CallbackPhase | None = None
        self._step_clock = StepClock()
        # Seconds spent in callbacks so far, by their ``timed_as``.
        self.callback_seconds: dict[TimedAs, float] = {}

    def stop(self, exit_code: int) -> None:
        """Ends the loop after this step; the process exits with this code. The first caller decides."""
        self.exit_code = exit_code if self.exit_code is None else self.exit_code

    def enter(self, phase: CallbackPhase) -> None:
        """Tells every callback what one of them begins."""
        self._phase = phase
        for callback in self.callbacks:
            callback.on_phase(self, phase)

    def fit(self) -> int:
        """Trains.

        Returns:
            The exit code: 0 after the last step, else the code that a callback stopped with.
        """
        last = self.components.config.training.train_iters
        try:
            for callback in self.callbacks:
                callback.before_training(self)
            while self.components.progress.iteration < last and self.exit_code is None:
                self.call_after_step(self.step())
            for callback in self.callbacks:
                with self._clock(callback):
                    callback.after_training(self)
        except (NumericsError, SilentCorruptionError) as error:
            with suppress(UserError):  # a superseded attempt: the commit says so on all ranks
                self.enter("saving")
            for callback in self.callbacks:
                try:
                    callback.on_numerics_error(error)
                except Exception as later:  # the first error tells the cause, and decides the exit code
                    log.error("while the run ended with an error: %s", later)
            raise
        finally:
            self.components.loader.close()
            for callback in self.callbacks:
                callback.close()
        return self.exit_code or 0

    def call_after_step(self, record: StepRecord) -> None:
        """Calls every callback with the step, and measures the time it takes."""
        for callback in self.callbacks:
            with self._clock(callback):
                callback.after_step(self, record)

    @contextmanager
    def _clock(self, callback: Callback) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if (name := callback.timed_as) is not None:
                taken = time.perf_counter() - started
                self.callback_seconds[name] = self.callback_seconds.get(name, 0.0) + taken
        if self._phase is not None:
            self._phase = None
            for other in self.callbacks:
                other.on_phase(self, None)

    def step(self) -> StepRecord:
        """Takes one step and updates the progress; does not call the callbacks."""
        components, config, progress = self.components, self.components.config, self.components.progress
        reader = components.data.at(progress.consumed_samples)
        components.model.set_rotary_base(reader.config.rope.base)
        batch = global_batch_size(progress.consumed_samples, reader.config.training)
        rate = learning_rate(
            progress.schedule_iteration + 1, optim=config.optim, train_iters=config.training.train_iters
        )
        set_learning_rate(components.optimizer, rate, weight_decay=config.optim.weight_decay)
        started = time.perf_counter()
        request = self._request(progress.consumed_samples, reader)
        batches = components.loader.load(reader, request, self._upcoming)
        waited = time.perf_counter() - started
        guard = self.guard
        if guard is not None:
            guard.before_step(StepInputs(batches, reader, request))
        # After the batches are there: the wait for them is measured by itself.
        before = self._step_clock.read()
        result = train_step(
            reader.config,
            components.model,
            components.optimizer,
            components.groups,
            components.forward_step,
            batches,
            before_update=self._before_update,
            examine=None if guard is None else guard.examine,
        )
        # For step_time_s alone: the step has read loss and gradient norm, so only the update is left to wait for.
        device.synchronize()
        elapsed, waits = time.perf_counter() - started, self._step_clock.read().since(before)
        progress.iteration += 1
        progress.consumed_samples += batch
        progress.consumed_tokens += result.tokens
        components.data.forget(progress.consumed_samples)
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
            communication_s=waits.communication_s,
            queued_s=waits.queued_s,
            extra={} if guard is None else dict(guard.finding),
        )

    def _before_update(self) -> None:
        for callback in self.callbacks:
            callback.before_optimizer_step(self)

    def _request(self, consumed: int, reader: StageReader) -> BatchRequest:
        training = reader.config.training
        return BatchRequest(consumed, global_batch_size(consumed, training), training.micro_batch_size)

    def _upcoming(self) -> Iterator[tuple[StageReader, BatchRequest]]:
        """The steps that follow the current one; the loader takes as many as it prefetches."""
        progress, config = self.components.progress, self.components.config
        consumed = progress.consumed_samples
        request = self._request(consumed, self.components.data.at(consumed))
        for _ in range(progress.iteration + 1, config.training.train_iters):
            consumed += request.global_batch_size
            reader = self.components.data.at(consumed)
            request = self._request(consumed, reader)
            yield reader, request
