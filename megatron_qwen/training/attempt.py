"""One attempt at a run: from a joined process group to an exit code."""

import logging
import time
from pathlib import Path

import torch.distributed as dist

from megatron_qwen.checkpoint.retain import clear_abandoned
from megatron_qwen.config.run import RunConfig
from megatron_qwen.distributed.placement import placement_report
from megatron_qwen.distributed.rank import RankInfo
from megatron_qwen.errors import Problem, UserError
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.phase_timeouts import PhaseTimeouts
from megatron_qwen.resilience.rank_end import attempt_of_controller
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.build import build_components
from megatron_qwen.training.callbacks.build import build_callbacks, build_guard
from megatron_qwen.training.callbacks.heartbeat import AttemptSuperseded
from megatron_qwen.training.environment_log import ENVIRONMENT, record_environment
from megatron_qwen.training.reference import know_reference
from megatron_qwen.training.resume import resume
from megatron_qwen.training.start_log import keep_log, log_choices, log_data
from megatron_qwen.training.trainer import Trainer

log = logging.getLogger(__name__)


def run_attempt(
    config: RunConfig, info: RankInfo, signals: StopSignals, run_dir: Path, *, started: float | None = None
) -> int:
    """Builds the components, resumes, trains, and records how the attempt ended.

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
    components = build_components(config)
    # Before the attempt is recorded: a run that cannot be built or resumed leaves no attempt in attempts.jsonl.
    resumed_at = resume(components, directory)
    know_reference(components, directory, resumed_at=resumed_at)
    controlled = attempt_of_controller() is not None
    attempt = _begin(directory)
    record_environment(directory.logs(attempt) / ENVIRONMENT)
    if dist.get_rank() == 0:
        if not controlled:  # a controller already keeps the output of every rank
            keep_log(directory.logs(attempt) / "rank_0.log")
        log_choices(components.config, components.choices, card=directory.performance)
        log_data(components)
    heartbeat = None
    if dist.get_rank() == 0:
        heartbeat = Heartbeat(
            directory.heartbeat,
            attempt=attempt,
            resumed_at=resumed_at,
            world_size=info.world_size,
            age_s=time.time() - started,
            timeouts=PhaseTimeouts(config.resilience.startup_timeout_s, config.resilience.hang_timeout_s),
        )
        heartbeat.beat("starting", resumed_at)
    code, reason = 1, "error"
    try:
        callbacks = build_callbacks(
            components, directory, signals, attempt=attempt, started=started, resumed_at=resumed_at, heartbeat=heartbeat
        )
        guard = build_guard(components, directory, callbacks)
        code = Trainer(components, callbacks, guard=guard).fit()
        reason = "finished" if code == 0 else f"stopped by {signals.received.name if signals.received else 'a signal'}"
    except UserError as error:
        code, reason = error.exit_code, error.kind
        raise
    finally:
        done = components.progress.iteration
        if heartbeat is not None:
            if reason != AttemptSuperseded.kind:  # then the file is the newer attempt's
                heartbeat.beat("finishing", done)
            if not controlled:
                directory.end_attempt(attempt, exit_code=code, reason=reason, iteration=done, gained=done - resumed_at)
    # All ranks leave together: once the first task exits, srun's --wait ends the rest after a timeout.
    dist.barrier()
    return code


def _begin(directory: RunDirectory) -> int:
    """Number of the attempt, the same on every rank.

    Rank 0 records the attempt, unless a controller has done so, and removes unfinished checkpoints of earlier attempts.
    """
    number = [attempt_of_controller() or 0]
    if dist.get_rank() == 0:
        number[0] = number[0] or directory.begin_attempt(world_size=dist.get_world_size())
        if directory.is_superseded(number[0]):
            raise AttemptSuperseded(
                Problem("attempt", number[0], "was superseded by a newer attempt before it could start.")
            )
        clear_abandoned(directory.checkpoints)
        directory.checkpoints.mkdir(exist_ok=True)
    dist.broadcast_object_list(number)
    return number[0]
