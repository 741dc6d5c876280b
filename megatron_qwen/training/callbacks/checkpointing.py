"""Saves at intervals, at the end, and when the run is asked to stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint import state
from megatron_qwen.checkpoint.optimizer_state import step_count
from megatron_qwen.checkpoint.write import CheckpointWriter
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import NumericsError, SilentCorruptionError
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.save_schedule import SaveSchedule
from megatron_qwen.training.step_record import StepRecord


class Checkpointing(Callback):
    """Writes the checkpoints of a run.

    Args:
        writer: commits them.
        schedule: when; None saves at the end only.
        saved: iteration whose checkpoint exists already.
        tokenizer: the run's copy of its tokenizer, where it has one.
        before_save: checks the state that is to be saved, on all ranks, and raises where it must not be.
        noted: to be noted in state.json of every checkpoint.
    """

    timed_as = "save"

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        schedule: SaveSchedule | None = None,
        saved: int,
        tokenizer: Path | None,
        before_save: Callable[[TrainingComponents], None] = lambda components: None,
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        self.writer, self.schedule, self._saved, self._tokenizer = writer, schedule, saved, tokenizer
        self._due, self._before_save, self._noted = False, before_save, noted or {}
        self._held_up_s = 0.0  # for which training has stood still for the save that is not committed yet

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Saves if it is time, and commits a background save that has finished.

        A skipped step is not saved; the next one that updates the weights is.
        """
        if self.schedule is None:
            return
        background = bool(trainer.components.config.checkpoint.async_save)
        self._due |= self.schedule.is_due(record.iteration, record.step_time_s)
        before, started = self.writer.newest, time.perf_counter()
        if self._due and not record.result.skipped:
            self._due = False
            trainer.enter("saving")
            self.schedule.begun(record.iteration)
            self.save(trainer.components, background=background)
        elif background and self.writer.is_written():
            trainer.enter("saving")  # a commit waits for the file system
            self.writer.finish()
        self._held_up_s += time.perf_counter() - started
        if (newest := self.writer.newest) is not None and newest != before:
            self.schedule.saved(newest, self._held_up_s)
            self._held_up_s = 0.0

    def after_training(self, trainer: TrainerInterface) -> None:
        """Saves the last state unless it is saved already."""
        trainer.enter("saving")
        if trainer.components.progress.iteration > self._saved:
            self.save(trainer.components, background=False)
        self.writer.finish()

    def on_numerics_error(self, error: NumericsError | SilentCorruptionError) -> None:
        """Commits a save that is still being written: it is the last good state."""
        self.writer.finish()

    def save(self, components: TrainingComponents, *, background: bool) -> None:
        """Saves the current state. With ``background``, a later ``finish`` of the writer commits it."""
        iteration = components.progress.iteration

        def write_small_files(directory: Path) -> None:
            state.write_small_files(
                directory,
                progress=components.progress.as_dict(),
                data=components.data.state(components.progress.consumed_samples),
                optimizer_step=step_count(components.optimizer),
                parallel=components.config.parallel,
                run_yaml=to_yaml(_as_of_now(components)),
                tokenizer=self._tokenizer,
                more=self._noted,
            )

        with components.model.whole_parameters():
            self._before_save(components)
            tensors = state.sharded_state(
                components.model.modules, components.optimizer, components.groups, loading=False
            )
            self.writer.save(iteration, tensors, write_small_files, background=background)
        self._saved = iteration


def _as_of_now(components: TrainingComponents) -> RunConfig:
    """The configuration with the RoPE of the last step, whose base a data stage may have changed: exports read it."""
    reader = components.data.latest(components.progress.consumed_samples)
    return replace(components.asked, rope=reader.config.rope)
