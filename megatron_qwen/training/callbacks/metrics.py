"""Turns a step into a record and hands it to the writers and the progress line."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.hardware import peak_tflops
from megatron_qwen.metrics.console import ProgressLine
from megatron_qwen.metrics.writers import MetricsWriter
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class Metrics(Callback):
    """Writes metrics on rank 0.

    Args:
        writers: where records go; empty on other ranks.
        attempt: number of this attempt.
        console: the progress line; None on other ranks.
    """

    def __init__(self, writers: Sequence[MetricsWriter], *, attempt: int, console: ProgressLine | None) -> None:
        self.writers, self.attempt, self.console = writers, attempt, console
        self._peak: float | None = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Reads what does not change from step to step."""
        config = trainer.components.config
        self._peak = peak_tflops(device.device_name(), config.precision.dtype)

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Writes the record of the step."""
        if dist.get_rank() != 0:
            return
        content = self._content(trainer, record)
        for writer in self.writers:
            writer.write(content)
        if self.console is not None and (
            self.console.live
            or record.iteration % trainer.components.config.metrics.log_interval == 0
            or not {"validation_loss", "evaluation_s"}.isdisjoint(record.extra)
        ):
            self.console.show(content, last_iteration=trainer.components.config.training.train_iters)

    def _content(self, trainer: TrainerInterface, record: StepRecord) -> dict[str, Any]:
        progress, result, world = trainer.components.progress, record.result, dist.get_world_size()
        config = record.config
        speed = result.tokens / record.step_time_s
        tflops = speed / world * training_flops_per_token(config.model, config.data.seq_length, config.lora) / 1e12
        return {
            **result.metrics,  # first, so that none of an objective replaces a figure of the step
            "iteration": record.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "lm_loss": result.loss,
            **({} if config.objective.kind == "pretrain" else {"loss": result.loss}),
            "grad_norm": result.grad_norm,
            "learning_rate": record.learning_rate,
            "global_batch_size": record.global_batch_size,
            "step_time_s": record.step_time_s,
            "data_wait_s": record.data_wait_s,
            "stage": record.stage,
            "seq_length": config.data.seq_length,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / world,
            "model_tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "peak_memory_gib": device.peak_memory_bytes() / 2**30,
            "skipped": result.skipped,
            "attempt": self.attempt,
            **record.extra,
        }

    def close(self) -> None:
        """Closes every writer."""
        for writer in self.writers:
            writer.close()
        if self.console is not None:
            self.console.close()
