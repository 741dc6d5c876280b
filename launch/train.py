"""``mq train``: checks everything that can be checked, then starts the ranks, or is one of them."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import by_hand, orphans, run_jobs
from launch.replay import replay_of
from launch.request import absolute_paths
from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.blend import SINGLE
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.config.world import smallest_world
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.job.local_ranks import LocalRanks
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory

_CLAIM_TIMEOUT_S = 60.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq train",
        description="Trains a recipe or a run.yaml. Under srun or torchrun this process is one rank; else it starts "
        "local ranks. The same command resumes a run that stopped.",
        examples=[
            "mq train tiny_dense data.path=data/corpus --run-dir runs/first",
            "mq train demo data.path=data/corpus data.tokenizer=tok --run-dir runs/demo --nproc 2",
            "mq train qwen2_5_7b data.path=/data/corpus --run-dir runs/7b --nproc 8",
            "mq train runs/first/run.yaml training.train_iters=200 --run-dir runs/first",
            "mq train --replay 1200 --run-dir runs/first",
            "mq config reference     all fields",
        ],
    )
    parser.add_argument(
        "source", nargs="?", help="a recipe (mq recipes) or a run.yaml; then section.field=value overrides"
    )
    parser.add_argument(
        "--run-dir", required=True, type=Path, help="directory of the run: all its files are written there"
    )
    parser.add_argument("--verbose", action="store_true", help="show every choice of the preset with its reason")
    parser.add_argument("--nproc", type=int, help="local ranks; default: the layout's size")
    parser.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="take the steps from the newest checkpoint before STEP up to STEP again, compare loss and gradient norm "
        "with metrics.jsonl, and print hashes of the weights; writes nothing into the run. Exit 0: equal, 1: different",
    )
    parser.add_argument("--json", action="store_true", help="of --replay")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Trains and returns the exit code."""
    options, overrides = parser().parse_known_args(arguments)
    if options.replay is not None:
        return replay_of(options, overrides, outer_world=None if _outer_rank() is None else _outer_world())
    if options.source is None:
        raise ConfigError("a recipe or a run.yaml is required (mq recipes lists the recipes).")
    if options.json:
        raise ConfigError("--json requires --replay.")
    config = absolute_paths(resolve(options.source, overrides, RECIPES))
    if options.verbose:
        os.environ["MQ_VERBOSE"] = "1"  # for the ranks
    rank = _outer_rank()
    if rank is not None:
        return _as_rank(config, options.run_dir, rank)
    if options.nproc is not None and options.nproc < 1:
        raise ConfigError(Problem("--nproc", options.nproc, "must be at least 1."))
    require_legal(config)
    world_size = options.nproc or smallest_world(config)
    require_legal(config, world_size=world_size)
    directory = RunDirectory(options.run_dir)
    orphans.settle_where_possible(directory)
    run_jobs.require_none(directory)
    by_hand.require_nobody(directory)
    digest = _require_data(config, world_size, directory)
    directory.claim(config, data_digest=digest)
    logs = directory.logs(directory.newest_attempt() + 1)
    return LocalRanks(directory.path, world_size=world_size, log_dir=logs).run()


def _outer_rank() -> int | None:
    """Rank given by torchrun or srun; None in a plain shell."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        wrong = [name for name in ("RANK", "WORLD_SIZE") if not os.environ[name].isdecimal()]
        if wrong:
            fix = "is not a number; unset it, or start this program with torchrun."
            raise ConfigError([Problem(f"environment variable {name}", os.environ[name], fix) for name in wrong])
        return int(os.environ["RANK"])
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return int(os.environ["SLURM_PROCID"])
    return None


def _outer_world() -> int:
    """World size given by torchrun or srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])


def _as_rank(config: RunConfig, run_dir: Path, rank: int) -> int:
    """Becomes a rank; rank 0 claims the directory first and the others wait for its run.yaml."""
    world_size = _outer_world()
    require_legal(config, world_size=world_size)
    directory = RunDirectory(run_dir)
    if rank == 0:
        orphans.settle_where_possible(directory)
        run_jobs.require_none(directory)
        by_hand.require_nobody(directory, elsewhere=False)  # whoever starts ranks on many nodes starts them again
        directory.claim(config, data_digest=_require_data(config, world_size, directory))
    else:
        _await(directory.run_yaml, to_yaml(directory.owned(config)))
    arguments = [sys.executable, "-P", "-m", "megatron_qwen.train", str(directory.path)]
    os.execv(sys.executable, arguments)


def _await(run_yaml: Path, text: str) -> None:
    """Waits until rank 0 has written this configuration; a shared file system may show it late."""
    deadline = time.monotonic() + _CLAIM_TIMEOUT_S
    while not run_yaml.is_file() or run_yaml.read_text() != text:
        if time.monotonic() > deadline:
            raise ConfigError(Problem(str(run_yaml), None, "was not written by rank 0; see the log of rank 0."))
        time.sleep(0.2)


def _require_data(config: RunConfig, world_size: int, directory: RunDirectory) -> str | None:
    from megatron_qwen.data.reading.preflight import require_usable

    data = require_usable(config, world_size=world_size)
    if config.data.blend is not None:
        from launch.ledger import require_continues

        require_continues(data, directory)
    return data.sources[SINGLE].tokens.digest if config.data.blend is None else None


if __name__ == "__main__":
    run_program(main)
