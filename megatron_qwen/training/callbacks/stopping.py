"""Ends the run at the end of a step when a signal asked for it, on all ranks together."""

import logging
import signal

import torch
import torch.distributed as dist

from megatron_qwen.errors import EXIT_REQUEUE
from megatron_qwen.resilience.signals import EXIT_INTERRUPTED, StopSignals
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)


class Stopping(Callback):
    """Asks all ranks after every step whether any of them was signalled.

    Args:
        signals: what this rank received.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Stops the trainer with exit code 75, or 130 after Ctrl-C; the checkpoint callback then saves."""
        flag = torch.tensor([int(self.signals.received or 0)], device=trainer.components.batch_slice.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag)
        if not number:
            return
        if dist.get_rank() == 0:
            log.info(
                "received %s: saving a checkpoint after iteration %d, then exiting",
                signal.Signals(number).name,
                record.iteration,
            )
        trainer.stop(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE)
