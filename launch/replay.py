"""``mq train --replay STEP``: starts the ranks of a run again, to compare a step with what the run recorded."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.config.world import smallest_world
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.job.local_ranks import LocalRanks
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory


def replay_of(options: argparse.Namespace, overrides: Sequence[str], *, outer_world: int | None) -> int:
    """Replays with as many ranks as the run's last attempt had; returns the exit code.

    Args:
        options: of ``mq train``.
        overrides: further words; none is allowed, because a replay takes the run as it is.
        outer_world: ranks that srun or torchrun has started, of which this process is one; None: it starts them.

    Raises:
        ConfigError: there is no run or no such step, or its configuration was to be changed.
    """
    directory = RunDirectory(options.run_dir)
    if given := [word for word in (options.source, *overrides) if word is not None]:
        fix = "cannot be combined with --replay, which takes the run as its run.yaml has it."
        raise ConfigError(Problem("command line", " ".join(given), fix))
    if not directory.run_yaml.is_file():
        raise ConfigError(Problem("--run-dir", directory.path, "holds no run (no run.yaml)."))
    config = resolve(str(directory.run_yaml), [], RECIPES)
    if not 1 <= options.replay <= config.training.train_iters:
        fix = f"must be from 1 to training.train_iters={config.training.train_iters}."
        raise ConfigError(Problem("--replay", options.replay, fix))
    world_size = outer_world or options.nproc or _ranks_of_the_run(directory, config)
    require_legal(config, world_size=world_size)
    words = ["--replay", str(options.replay), *(["--json"] if options.json else [])]
    if outer_world is not None:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "megatron_qwen.train", str(directory.path), *words])
    with tempfile.TemporaryDirectory() as logs:
        return LocalRanks(directory.path, world_size=world_size, log_dir=Path(logs), options=words).run()


def _ranks_of_the_run(directory: RunDirectory, config: RunConfig) -> int:
    """World size of the newest attempt that recorded it: bits repeat only with as many data-parallel ranks."""
    sizes = [attempt.world_size for attempt in AttemptLog(directory.attempts).read() if attempt.world_size]
    return sizes[-1] if sizes else smallest_world(config)
