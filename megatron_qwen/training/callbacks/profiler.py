"""A torch profiler window, as a Chrome trace per rank."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord


class Profiler(Callback):
    """Records profile_iters steps from profile_start on.

    Args:
        directory: where ``rank_N.json.gz`` goes; Perfetto and Chrome open it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._profile: Any = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Starts at once where the first step is in the window."""
        self._begin_if_due(trainer)

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Starts and ends the window."""
        settings = trainer.components.config.metrics
        assert settings.profile_start is not None
        if self._profile is not None and record.iteration == settings.profile_start + settings.profile_iters - 1:
            self._profile.stop()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.directory / f"rank_{dist.get_rank()}.json.gz"))
            self._profile = None
        self._begin_if_due(trainer)

    def _begin_if_due(self, trainer: TrainerInterface) -> None:
        if trainer.components.progress.iteration + 1 == trainer.components.config.metrics.profile_start:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
