"""Keeps the run's performance card."""

import logging
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.estimate.flops import FORMULA, training_flops_per_token
from megatron_qwen.estimate.hardware import known
from megatron_qwen.metrics.performance_card import AttemptTime, read_attempts, write_card
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.held_memory import held_bytes
from megatron_qwen.training.save_schedule import SaveSchedule
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)
_WRITE_INTERVAL_S = 60.0
# The first steps of an attempt compile, allocate and warm caches.
_WARM_UP_STEPS, _REMEMBERED_STEPS = 3, 10_000
_GIB = 2.0**30


class Performance(Callback):
    """Writes performance.json every minute and at the end; the last in the list of callbacks.

    Args:
        path: the file.
        attempt: number of this attempt.
        started: when the process began, seconds since 1970.
        resumed_at: iteration that training resumes from.
        saving: what is known of the interval of checkpoints.
    """

    def __init__(
        self, path: Path, *, attempt: int, started: float, resumed_at: int, saving: SaveSchedule | None = None
    ) -> None:
        self._saving = saving
        self.path, self.attempt, self.started, self.resumed_at = path, attempt, started, resumed_at
        self._begun = self._written = time.time()
        self._seconds = {"steps_s": 0.0, "skipped_s": 0.0, "data_wait_s": 0.0}
        self._speeds: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED_STEPS)
        self._held: list[dict[str, int]] = []
        self._peaks: list[int] = []
        self._trainer: TrainerInterface | None = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Counts what every rank holds."""
        self._trainer = trainer
        self._held = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(self._held, held_bytes(trainer.components))
        self._begun = time.time()
        self._write()  # so that an attempt that is killed early is in the card

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Adds the step."""
        seconds = record.step_time_s - record.data_wait_s
        self._seconds["skipped_s" if record.result.skipped else "steps_s"] += seconds
        self._seconds["data_wait_s"] += record.data_wait_s
        if record.iteration - self.resumed_at > _WARM_UP_STEPS:
            tokens = record.result.tokens / record.step_time_s
            flops = training_flops_per_token(record.config.model, record.config.data.seq_length, record.config.lora)
            self._speeds.append((tokens / dist.get_world_size(), flops))
        if time.time() - self._written > _WRITE_INTERVAL_S:
            self._write()

    def after_training(self, trainer: TrainerInterface) -> None:
        """Asks every rank for its peak."""
        self._peaks = [0] * dist.get_world_size()
        dist.all_gather_object(self._peaks, device.peak_memory_bytes())

    def close(self) -> None:
        """Writes the card a last time."""
        if self._trainer is not None:
            self._write()

    def _write(self) -> None:
        self._written = time.time()
        if dist.get_rank() != 0 or self._trainer is None:
            return
        others = [one for one in read_attempts(self.path) if one.attempt != self.attempt]
        if any(one.attempt > self.attempt for one in others):
            return  # this attempt was superseded, and the card is the newer one's
        try:
            write_card(self.path, self._facts(self._trainer), [*others, self._time(self._trainer)])
        except OSError as error:  # a full disk must not end the run, nor hide why it ends
            log.warning("the performance card %s could not be written: %s", self.path, error)

    def _time(self, trainer: TrainerInterface) -> AttemptTime:
        spent = trainer.callback_seconds
        return AttemptTime(
            attempt=self.attempt,
            devices=dist.get_world_size(),
            started=self.started,
            resumed_at=self.resumed_at,
            iteration=trainer.components.progress.iteration,
            wall_s=time.time() - self.started,
            startup_s=self._begun - self.started,
            save_s=spent.get("save", 0.0),
            validation_s=spent.get("validation", 0.0),
            evaluation_s=spent.get("evaluation", 0.0),
            **self._seconds,
        )

    def _facts(self, trainer: TrainerInterface) -> dict[str, Any]:
        """What this attempt measured."""
        config, name = trainer.components.config, device.device_name()
        kind = known(name)
        peak = kind.peak_tflops if kind is not None and config.precision.dtype == "bf16" else None
        speed = flops = None
        if self._speeds:
            speed = statistics.median(tokens for tokens, _ in self._speeds)
            flops = statistics.median(tokens * each for tokens, each in self._speeds)
        return {
            "recipe": config.recipe,
            "device": name,
            "devices": dist.get_world_size(),
            "backend": trainer.components.backend.name,
            "dtype": config.precision.dtype,
            "fp8": config.precision.fp8,
            "seq_length": config.data.seq_length,
            "routing": _routing(trainer),
            "tokens_per_second_per_device": speed,
            "model_flops_per_token": training_flops_per_token(config.model, config.data.seq_length, config.lora),
            "model_flops_formula": FORMULA,
            "model_tflops_per_device": None if flops is None else flops / 1e12,
            "mfu": None if flops is None or peak is None else flops / (peak * 1e12),
            "peak_tflops": peak,
            "peak": None if peak is None or kind is None else f"dense bf16 of one {kind.name.upper()}, data sheet",
            "steps_measured": len(self._speeds),
            "memory": self._memory(),
            "saving": None if self._saving is None else self._saving.as_dict(),
            "choices": {
                choice.field: {"value": choice.value, "reason": choice.reason, "forced": choice.forced}
                for choice in trainer.components.choices
            },
        }

    def _memory(self) -> dict[str, Any]:
        """Memory in GiB of the rank with the highest peak: persistent tensors by kind, the peak, and the rest of it.

        On a CPU the peak is the process's resident set, with the libraries it has loaded.
        """
        peaks = self._peaks or [device.peak_memory_bytes()]
        fullest = max(range(len(peaks)), key=peaks.__getitem__)
        parts = {f"{name}_gib": size / _GIB for name, size in self._held[fullest].items()}
        peak = peaks[fullest] / _GIB
        rest = max(0.0, peak - sum(parts.values()))
        return {"rank": fullest, "peak_gib": peak, **parts, "activations_and_workspace_gib": rest}


def _routing(trainer: TrainerInterface) -> str:
    model = trainer.components.config.model
    if not model.is_moe:
        return "dense: none"
    return "forced: even, at random" if model.moe_router_force_load_balancing else "natural"
