"""Builds the callbacks of a run, in the order in which they act."""

import logging
import os
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint.write import CheckpointWriter
from megatron_qwen.config.resilience import ResilienceConfig
from megatron_qwen.metrics.console import ProgressLine
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.rank_end import attempt_of_controller
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.resilience.straggler_leave import StragglerLeave, can_leave
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.callbacks.checkpointing import Checkpointing
from megatron_qwen.training.callbacks.evaluation import Evaluation
from megatron_qwen.training.callbacks.expert_load import ExpertLoad
from megatron_qwen.training.callbacks.garbage import GarbageCollection
from megatron_qwen.training.callbacks.heartbeat import HeartbeatCallback
from megatron_qwen.training.callbacks.integrity import Integrity
from megatron_qwen.training.callbacks.local_checkpoints import LocalCheckpoints
from megatron_qwen.training.callbacks.metrics import Metrics
from megatron_qwen.training.callbacks.numerics import NumericsGuard
from megatron_qwen.training.callbacks.performance import Performance
from megatron_qwen.training.callbacks.profiler import Profiler
from megatron_qwen.training.callbacks.samples import Samples
from megatron_qwen.training.callbacks.stopping import Stopping
from megatron_qwen.training.callbacks.stragglers import EndOfCallbacks, Stragglers
from megatron_qwen.training.callbacks.validation import Validation
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.history import recent
from megatron_qwen.training.integrity.rerun import StepGuard
from megatron_qwen.training.local_resume import local_place, newest_committed
from megatron_qwen.training.lora_start import base_of_run
from megatron_qwen.training.save_schedule import build_schedule
from megatron_qwen.training.writers import build_writers

log = logging.getLogger(__name__)


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
    # First after a step: nothing may change what the update has written before its hash is noted.
    integrity = build_integrity(components)
    if integrity is not None:
        callbacks.append(integrity)
    stragglers: Stragglers | None = None
    # Before all others: an attempt that a newer one has superseded must not write the metrics of this step either.
    if heartbeat is not None:
        callbacks.append(HeartbeatCallback(heartbeat, is_current=lambda: not directory.is_superseded(attempt)))
    if interval := config.performance.garbage_collection_interval:
        callbacks.append(GarbageCollection(interval))
    # These three add to the record what Metrics writes.
    if config.resilience.straggler_interval and dist.get_world_size() > 1:
        stragglers = _stragglers(config.resilience, directory, attempt=attempt, resumed_at=resumed_at)
        callbacks.append(stragglers)
    if config.model.is_moe:
        callbacks.append(ExpertLoad())
    if config.training.eval_iters and config.data.validation_fraction:
        callbacks.append(Validation(None if config.data.tokenizer is None else directory.tokenizer))
    if config.evaluation.tasks:
        callbacks.append(Evaluation(directory.tokenizer))
    if config.evaluation.prompts:
        callbacks.append(Samples(directory.tokenizer, directory.samples))
    console = ProgressLine() if dist.get_rank() == 0 else None
    callbacks.append(Metrics(build_writers(config, directory, resumed_at), attempt=attempt, console=console))
    # After Metrics, so that the step that ends the run is recorded. Before Checkpointing, so that it is not saved.
    callbacks.append(NumericsGuard())
    if config.metrics.profile_start is not None:
        callbacks.append(Profiler(directory.profile))
    check = _nothing if integrity is None else integrity.before_save
    checkpointing = _checkpointing(
        components, directory, check, attempt=attempt, started=started, resumed_at=resumed_at
    )
    callbacks.append(checkpointing)
    if config.checkpoint.local_interval is not None:
        # After Checkpointing: when the last state is committed, local checkpoints are removed.
        callbacks.append(_local_checkpoints(components, directory, checkpointing.writer, check, attempt=attempt))
    # After Checkpointing: a signal that comes while the step saves is noticed in the same step.
    callbacks.append(Stopping(signals))
    # After all that acts: its figures include the time of all other callbacks in the same step.
    callbacks.append(
        Performance(
            directory.performance,
            attempt=attempt,
            started=started,
            resumed_at=resumed_at,
            saving=checkpointing.schedule,
        )
    )
    if stragglers is not None:
        callbacks.append(EndOfCallbacks(stragglers))
    return callbacks


def _stragglers(settings: ResilienceConfig, directory: RunDirectory, *, attempt: int, resumed_at: int) -> Stragglers:
    world = dist.group.WORLD
    assert world is not None  # torch.distributed has been joined
    leaves = settings.straggler_action == "requeue" and attempt_of_controller() is not None and can_leave(os.environ)
    return Stragglers(
        settings,
        group=world,
        path=directory.stragglers,
        attempt=attempt,
        resumed_at=resumed_at,
        leave=StragglerLeave(AttemptLog(directory.attempts), directory.logs(attempt)) if leaves else None,
    )


def build_integrity(components: TrainingComponents) -> Integrity | None:
    """The checks of the state of a run; None where they are turned off."""
    settings = components.config.resilience
    if not settings.weight_check_interval:
        return None
    return Integrity(components, interval=settings.weight_check_interval, parts=settings.optimizer_check_parts)


def build_guard(
    components: TrainingComponents, directory: RunDirectory, callbacks: Sequence[Callback]
) -> StepGuard | None:
    """What looks at gradients before the update; None where the configuration asks for nothing of it.

    Args:
        components: of the run, resumed.
        directory: of the run, whose metrics have the steps before.
        callbacks: of the run.
    """
    settings = components.config.resilience
    if not settings.spike_threshold and not settings.rerun_interval:
        return None
    if components.config.precision.fp8 == "delayed":
        if dist.get_rank() == 0:
            log.info("steps are not computed again: with precision.fp8=delayed each pass changes the next one's scales")
        return None
    checks = [callback for callback in callbacks if isinstance(callback, Integrity)]

    def require_sound(when: str) -> None:
        for check in checks:
            check.require_sound(components, when=when)

    def before_rerun() -> None:
        for callback in callbacks:
            callback.before_rerun()

    guard = StepGuard(components, require_sound=require_sound, before_rerun=before_rerun)
    iteration = components.progress.iteration
    records = [recent(directory.metrics, last=iteration, count=guard.memory) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(records)
    guard.recall(records[0])
    return guard


def _nothing(components: TrainingComponents) -> None:
    """Checks nothing before a save."""


def _checkpointing(
    components: TrainingComponents,
    directory: RunDirectory,
    check: Callable[[TrainingComponents], None],
    *,
    attempt: int,
    started: float,
    resumed_at: int,
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
    # What is resumed from a local checkpoint is not committed yet.
    saved = resumed_at if settings.local_interval is None else min(resumed_at, newest_committed(directory))
    restart_s = time.time() - started
    schedule = build_schedule(settings, directory, saved_at=saved, resumed_at=resumed_at, restart_s=restart_s)
    return Checkpointing(
        writer,
        schedule=schedule,
        saved=saved,
        tokenizer=directory.tokenizer,
        before_save=check,
        noted=base_of_run(directory) if dist.get_rank() == 0 else None,
    )


def _local_checkpoints(
    components: TrainingComponents,
    directory: RunDirectory,
    writer: CheckpointWriter,
    check: Callable[[TrainingComponents], None],
    *,
    attempt: int,
) -> LocalCheckpoints:
    place, at_start = local_place(components, directory), newest_committed(directory)
    assert place is not None, "the attempt is recorded"
    return LocalCheckpoints(place, attempt=attempt, committed=lambda: writer.newest or at_start, before_save=check)
