"""Writes local checkpoints every few steps, and removes them when the run has saved its last state."""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_qwen.checkpoint import generators
from megatron_qwen.checkpoint.local import nodes
from megatron_qwen.checkpoint.local.state import own_tensors
from megatron_qwen.checkpoint.local.write import LocalCheckpointWriter
from megatron_qwen.checkpoint.optimizer_state import step_count
from megatron_qwen.errors import NumericsError, SilentCorruptionError
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.local_resume import GENERATOR, LocalPlace
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)


class LocalCheckpoints(Callback):
    """Local checkpoints of an attempt; comes after Checkpointing, whose last save makes them superfluous.

    Args:
        place: where they go.
        attempt: number of this attempt.
        committed: iteration of the newest committed checkpoint, 0 without one.
        before_save: checks the state that is to be saved, on all ranks, and raises where it must not be.
    """

    timed_as = "save"

    def __init__(
        self,
        place: LocalPlace,
        *,
        attempt: int,
        committed: Callable[[], int],
        before_save: Callable[[TrainingComponents], None] = lambda components: None,
    ) -> None:
        self._place, self._committed, self._before_save = place, committed, before_save
        partners = place.nodes.partners(dist.get_rank())
        self._writer = LocalCheckpointWriter(place.directory, attempt=attempt, layout=place.layout, partners=partners)

    def before_training(self, trainer: TrainerInterface) -> None:
        """Says where they go, and what else is there."""
        if dist.get_rank() != 0:
            return
        interval = trainer.components.config.checkpoint.local_interval
        names = self._place.nodes.names
        copied = "with a copy on another node"
        if len(names) == 1:
            copied = f"without a copy: all ranks are on {names[0]}"
        log.info("local checkpoints every %s iterations in %s, %s", interval, self._place.directory, copied)
        if others := nodes.others_in(self._place.directory):
            log.warning(
                "%s holds local checkpoints of %d other runs; remove those of runs that have ended",
                *(self._place.directory.parent, len(others)),
            )

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Saves if it is time; a skipped step is not saved."""
        interval = trainer.components.config.checkpoint.local_interval
        if interval and record.iteration % interval == 0 and not record.result.skipped:
            self.save(trainer.components)

    def save(self, components: TrainingComponents) -> None:
        """Copies the state of this rank; a thread writes it."""
        with components.model.whole_parameters():
            self._before_save(components)
        facts = {
            "progress": components.progress.as_dict(),
            "data": components.data.state(components.progress.consumed_samples),
            "optimizer_step": step_count(components.optimizer),
            "committed": self._committed(),
        }
        states = generators.capture()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from own_tensors(components.model, components.optimizer)
            yield from ((GENERATOR + name, state) for name, state in states.items())

        self._writer.save(components.progress.iteration, tensors, facts)

    def after_training(self, trainer: TrainerInterface) -> None:
        """Removes them: the last state is committed."""
        self._writer.discard()

    def on_numerics_error(self, error: NumericsError | SilentCorruptionError) -> None:
        """Removes them where the run diverged: a committed checkpoint before that is resumed from.

        Silent corruption has passed into none of them: they were checked as committed ones are (``before_save``).
        """
        if isinstance(error, NumericsError):
            self._writer.discard()

    def close(self) -> None:
        """Lets the newest one be finished."""
        self._writer.close()
