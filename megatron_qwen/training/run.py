"""One attempt at a run: from a joined process group to an exit code."""

import logging
import time
from pathlib import Path

import torch.distributed as dist

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint import find, state
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.retain import clear_abandoned
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.checkpoint.write import CheckpointWriter
from megatron_qwen.config.run import RunConfig, as_dict
from megatron_qwen.data.reading.reading_plan import plan, warnings
from megatron_qwen.distributed.placement import placement_report
from megatron_qwen.distributed.rank import RankInfo
from megatron_qwen.errors import CheckpointError, Problem, UserError
from megatron_qwen.metrics.console import ProgressLine
from megatron_qwen.metrics.wandb_writer import WandbWriter
from megatron_qwen.metrics.writers import JsonlWriter, MetricsWriter, TensorBoardWriter
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.rank_end import attempt_of_controller
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.base import Callback
from megatron_qwen.training.callbacks.checkpointing import Checkpointing
from megatron_qwen.training.callbacks.expert_load import ExpertLoad
from megatron_qwen.training.callbacks.garbage import GarbageCollection
from megatron_qwen.training.callbacks.metrics import Metrics
from megatron_qwen.training.callbacks.numerics import NumericsGuard
from megatron_qwen.training.callbacks.performance import Performance
from megatron_qwen.training.callbacks.profiler import Profiler
from megatron_qwen.training.callbacks.signs_of_life import SignsOfLife, Superseded
from megatron_qwen.training.callbacks.stopping import Stopping
from megatron_qwen.training.callbacks.validation import Validation
from megatron_qwen.training.setup import Parts, build_parts
from megatron_qwen.training.trainer import Trainer

log = logging.getLogger(__name__)
_LISTED_SOURCES = 12


def run_attempt(
    config: RunConfig, info: RankInfo, signals: StopSignals, run_dir: Path, *, started: float | None = None
) -> int:
    """Builds, resumes, trains and notes how it ended.

    Args:
        config: a legal configuration.
        info: of this rank.
        signals: installed already.
        run_dir: the run.
        started: when the process began, seconds since 1970; None is now.

    Returns:
        The exit code.
    """
    directory, started = RunDirectory(run_dir), started or time.time()
    if report := placement_report(info):
        log.info("%s", report)
    parts = build_parts(config)
    resumed_at = resume(parts, directory)
    controlled = attempt_of_controller() is not None
    attempt = _begin(directory)
    if dist.get_rank() == 0:
        if not controlled:  # the controller keeps what every rank prints
            _log_to(directory.logs(attempt) / "rank_0.log")
        _log_data(parts)
    heartbeat = None
    if dist.get_rank() == 0:
        heartbeat = Heartbeat(directory.heartbeat, attempt=attempt, resumed_at=resumed_at)
        heartbeat.beat("starting", resumed_at)
    code, reason = 1, "error"
    try:
        callbacks = build_callbacks(
            parts, directory, signals, attempt=attempt, resumed_at=resumed_at, heartbeat=heartbeat
        )
        card = Performance(directory.performance, attempt=attempt, started=started, resumed_at=resumed_at)
        trainer = Trainer(parts, [*callbacks, card])
        code = trainer.fit()
        reason = "finished" if code == 0 else f"stopped by {signals.received.name if signals.received else 'a signal'}"
    except UserError as error:
        code, reason = error.exit_code, error.kind
        raise
    finally:
        done = parts.progress.iteration
        if heartbeat is not None:
            heartbeat.beat("finishing", done)
            if not controlled:
                directory.end_attempt(attempt, exit_code=code, reason=reason, iteration=done, gained=done - resumed_at)
    # All leave together: where one of them is gone srun gives the others little time.
    dist.barrier()
    return code


def _log_to(path: Path) -> None:
    """Rank 0 speaks on the terminal; what it logs is kept as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("megatron_qwen").addHandler(handler)


def _log_data(parts: Parts) -> None:
    consumed = parts.progress.consumed_samples
    reader = parts.data.at(consumed)
    tokens = sum(parts.data.sources[name].stop for name in reader.stage.weights)
    log.info(
        "data: stage %s from sample %s on, %s training tokens in %d sources, %d tokens a sample",
        reader.stage.name,
        f"{consumed:,}",
        f"{tokens:,}",
        len(reader.stage.weights),
        reader.seq_length,
    )
    stages = plan(parts.data, iteration=parts.progress.iteration)
    epochs = {share.name: share.epochs_so_far for stage in stages for share in stage.sources}
    listed = ", ".join(f"{name} {often:.2f}" for name, often in sorted(epochs.items())[:_LISTED_SOURCES])
    log.info("data: epochs that the whole run reads: %s%s", listed, ", ..." if len(epochs) > _LISTED_SOURCES else "")
    for problem in warnings(parts.data, stages):
        log.warning("data: %s", problem)


def resume(parts: Parts, directory: RunDirectory) -> int:
    """Loads the newest good checkpoint of the run, else the one to branch or to start from, else nothing.

    Returns:
        The iteration training goes on from.
    """
    settings = parts.config.checkpoint
    try:
        candidates, goes_on = find.resolve(directory.checkpoints), True
    except CheckpointError:
        beginning = settings.branch_from or settings.load
        if beginning is None:
            return 0
        candidates, goes_on = find.resolve(Path(beginning)), settings.branch_from is not None
    chosen = find.newest_good(candidates, strict=settings.strict)
    # A model of another shape is refused by name here, before the core meets it.
    reader = CheckpointReader(chosen.path)
    CheckpointWeights(reader, parts.config.model)
    saved = state.read_state(chosen.path)
    state.load_sharded(
        chosen.path, parts.model.modules, parts.optimizer, parts.groups, optimizer_step=saved["optimizer_step"]
    )
    if dist.get_rank() == 0 and not state.has_optimizer(reader.tensors()):
        log.info("%s holds weights only: the optimizer's moments start at zero", chosen.path)
    if not goes_on:
        return 0
    parts.progress.restore(saved["progress"])
    if "data" not in saved:
        fix = "holds no ledger of what was read: an older version wrote it. Begin a run from it (checkpoint.load)."
        raise CheckpointError(Problem(str(chosen.path), None, fix))
    parts.data.resume(saved["data"])
    if parts.data.consumed != parts.progress.consumed_samples:
        fix = f"but its ledger ends at {parts.data.consumed}; the checkpoint is damaged, use an older one."
        raise CheckpointError(Problem(f"{chosen.path}: consumed_samples", parts.progress.consumed_samples, fix))
    restored = state.restore_generators(chosen.path, parallel=parts.config.parallel, state=saved)
    if dist.get_rank() == 0:
        note = "" if restored else "; another layout, so dropout is seeded anew"
        log.info("resumed from %s at iteration %d%s", chosen.path, parts.progress.iteration, note)
    return parts.progress.iteration


def build_callbacks(
    parts: Parts,
    directory: RunDirectory,
    signals: StopSignals,
    *,
    attempt: int,
    resumed_at: int,
    heartbeat: Heartbeat | None,
) -> list[Callback]:
    """The features of a run, in the order in which they act after a step."""
    config = parts.config
    writer = CheckpointWriter(
        directory.checkpoints,
        attempt=attempt,
        attempts=AttemptLog(directory.attempts),
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        keep_at=config.checkpoint.save_at,
    )
    console = ProgressLine() if dist.get_rank() == 0 else None
    callbacks: list[Callback] = []
    if heartbeat is not None:
        callbacks.append(SignsOfLife(heartbeat, is_current=lambda: directory.newest_attempt() == attempt))
    if interval := config.performance.garbage_collection_interval:
        callbacks.append(GarbageCollection(interval))
    if config.model.is_moe:
        callbacks.append(ExpertLoad())
    if config.training.eval_iters and config.data.validation_fraction:
        callbacks.append(Validation())
    callbacks.append(Metrics(build_writers(config, directory, resumed_at), attempt=attempt, console=console))
    callbacks.append(NumericsGuard())
    checkpointing = Checkpointing(writer, resumed_at=resumed_at, tokenizer=directory.tokenizer)
    if config.metrics.profile_start is not None:
        callbacks.append(Profiler(directory.profile))
    return [*callbacks, checkpointing, Stopping(signals)]


def build_writers(config: RunConfig, directory: RunDirectory, resumed_at: int) -> list[MetricsWriter]:
    """Writers of rank 0; none on other ranks."""
    if dist.get_rank() != 0:
        return []
    writers: list[MetricsWriter] = [JsonlWriter(directory.metrics, resumed_at=resumed_at)]
    if config.metrics.tensorboard:
        writers.append(TensorBoardWriter(directory.tensorboard, resumed_at=resumed_at))
    if config.metrics.wandb_project is not None:
        writers.append(WandbWriter(config.metrics.wandb_project, run_dir=directory.path, config=as_dict(config)))
    return writers


def _begin(directory: RunDirectory) -> int:
    """Rank 0 notes the attempt, unless a controller has, and clears what earlier ones left half done.

    Every rank learns the number.
    """
    number = [attempt_of_controller() or 0]
    if dist.get_rank() == 0:
        number[0] = number[0] or directory.begin_attempt(world_size=dist.get_world_size())
        if directory.newest_attempt() != number[0]:
            raise Superseded(Problem("attempt", number[0], "has been followed by another before it could begin."))
        clear_abandoned(directory.checkpoints)
        directory.checkpoints.mkdir(exist_ok=True)
    dist.broadcast_object_list(number)
    return number[0]
