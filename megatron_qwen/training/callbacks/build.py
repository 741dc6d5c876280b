"""Builds the callbacks of a run, in the order in which they act."""

import torch.distributed as dist

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint.write import CheckpointWriter
from megatron_qwen.metrics.console import ProgressLine
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.callbacks.checkpointing import Checkpointing
from megatron_qwen.training.callbacks.expert_load import ExpertLoad
from megatron_qwen.training.callbacks.garbage import GarbageCollection
from megatron_qwen.training.callbacks.heartbeat import HeartbeatCallback
from megatron_qwen.training.callbacks.metrics import Metrics
from megatron_qwen.training.callbacks.numerics import NumericsGuard
from megatron_qwen.training.callbacks.performance import Performance
from megatron_qwen.training.callbacks.profiler import Profiler
from megatron_qwen.training.callbacks.stopping import Stopping
from megatron_qwen.training.callbacks.validation import Validation
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.writers import build_writers


def build_callbacks(
    components: TrainingComponents,
    directory: RunDirectory,
    signals: StopSignals,
    *,
    attempt: int,
    started: float,
    resumed_at: int,
    heartbeat: Heartbeat | None,
) -> list[Callback]:
    """The features of a run, in the order in which they act after a step.

    Args:
        components: of the run.
        directory: of the run.
        signals: that this rank receives.
        attempt: number of this attempt.
        started: when the process began, seconds since 1970.
        resumed_at: iteration that training resumes from.
        heartbeat: of rank 0; None on other ranks.
    """
    config = components.config
    callbacks: list[Callback] = []
    # First: an attempt that a newer one has superseded must not write the metrics of this step either.
    if heartbeat is not None:
        callbacks.append(HeartbeatCallback(heartbeat, is_current=lambda: directory.newest_attempt() == attempt))
    if interval := config.performance.garbage_collection_interval:
        callbacks.append(GarbageCollection(interval))
    # These two add to the record what Metrics writes.
    if config.model.is_moe:
        callbacks.append(ExpertLoad())
    if config.training.eval_iters and config.data.validation_fraction:
        callbacks.append(Validation())
    console = ProgressLine() if dist.get_rank() == 0 else None
    callbacks.append(Metrics(build_writers(config, directory, resumed_at), attempt=attempt, console=console))
    # After Metrics, so that the step that ends the run is recorded. Before Checkpointing, so that it is not saved.
    callbacks.append(NumericsGuard())
    if config.metrics.profile_start is not None:
        callbacks.append(Profiler(directory.profile))
    callbacks.append(_checkpointing(components, directory, attempt=attempt, resumed_at=resumed_at))
    # After Checkpointing: a signal that comes while the step saves is noticed in the same step.
    callbacks.append(Stopping(signals))
    # Last: its figures include the time of all other callbacks in the same step.
    callbacks.append(Performance(directory.performance, attempt=attempt, started=started, resumed_at=resumed_at))
    return callbacks


def _checkpointing(
    components: TrainingComponents, directory: RunDirectory, *, attempt: int, resumed_at: int
) -> Checkpointing:
    settings = components.config.checkpoint
    writer = CheckpointWriter(
        directory.checkpoints,
        attempt=attempt,
        attempts=AttemptLog(directory.attempts),
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        keep_at=settings.save_at,
    )
    return Checkpointing(writer, resumed_at=resumed_at, tokenizer=directory.tokenizer)
