"""Saves at intervals, at the end, and when the run is asked to stop."""

from dataclasses import replace
from pathlib import Path

from megatron_qwen.checkpoint import state
from megatron_qwen.checkpoint.optimizer_state import step_count
from megatron_qwen.checkpoint.write import CheckpointWriter
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import RunConfig
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.step_record import StepRecord


class Checkpointing(Callback):
    """Writes the checkpoints of a run.

    Args:
        writer: commits them.
        resumed_at: iteration the run started from, whose checkpoint exists already.
        tokenizer: the run's copy of its tokenizer, where it has one.
    """

    timed_as = "save"

    def __init__(self, writer: CheckpointWriter, *, resumed_at: int, tokenizer: Path | None) -> None:
        self.writer, self._saved, self._tokenizer = writer, resumed_at, tokenizer
        self._due = False

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Saves if it is time, and commits a background save that has finished.

        A skipped step is not saved; the next one that updates the weights is.
        """
        settings = trainer.components.config.checkpoint
        self._due |= settings.save_interval > 0 and record.iteration % settings.save_interval == 0
        self._due |= record.iteration in settings.save_at
        if self._due and not record.result.skipped:
            self._due = False
            self.save(trainer.components, background=settings.async_save)
        elif settings.async_save:
            self.writer.finish(wait=False)

    def after_training(self, trainer: TrainerInterface) -> None:
        """Saves the last state unless it is saved already."""
        if trainer.components.progress.iteration > self._saved:
            self.save(trainer.components, background=False)
        self.writer.finish(wait=True)

    def on_numerics_error(self) -> None:
        """Commits a save that is still being written: it is the last good state."""
        self.writer.finish(wait=True)

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
            )

        with components.model.whole_parameters():
            tensors = state.sharded_state(
                components.model.modules, components.optimizer, components.groups, loading=False
            )
            self.writer.save(iteration, tensors, write_small_files, background=background)
        self._saved = iteration


def _as_of_now(components: TrainingComponents) -> RunConfig:
    """The configuration with the RoPE of the last step, whose base a data stage may have changed: exports read it."""
    reader = components.data.latest(components.progress.consumed_samples)
    return replace(components.asked, rope=reader.config.rope)
