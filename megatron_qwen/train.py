"""Entry of a rank: join, build, load, fit, leave. ``mq train`` starts it; so do srun and torchrun.

python -m megatron_qwen.train RUN_DIR
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path

import psutil

from megatron_qwen import device
from megatron_qwen.core_patches.install import prepare_process
from megatron_qwen.resilience import stack_dump
from megatron_qwen.resilience.rank_end import attempt_of_controller, rank_end
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory


def main(run_dir: str) -> int:
    """Runs one rank of the run in ``run_dir`` and returns its exit code."""
    # Before the imports, which take seconds: a stop signal may arrive while they run.
    signals = StopSignals()
    signals.install()
    stack_dump.install()
    # Before Blackwell, overlap of tensor-parallel communication needs kernels to start in the order of their launch,
    # which a single hardware queue guarantees (megatron-core requires it with sequence parallelism).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    prepare_process()
    from megatron_qwen.config.checks import require_legal
    from megatron_qwen.config.source import resolve
    from megatron_qwen.distributed.rank import RankInfo, join, leave
    from megatron_qwen.recipes.registry import RECIPES
    from megatron_qwen.resilience.parent import die_with_launcher
    from megatron_qwen.training.attempt import run_attempt

    die_with_launcher()
    info = RankInfo.from_environment()
    config = resolve(str(Path(run_dir) / "run.yaml"), [], RECIPES)
    require_legal(config, world_size=info.world_size)
    device.set_threads(config.performance.threads_per_rank or device.fair_threads(info.local_world_size))
    join(info, timeout_minutes=config.parallel.distributed_timeout_minutes)
    code = run_attempt(config, info, signals, Path(run_dir), started=psutil.Process().create_time())
    # Only after a normal end: destroying the group would wait for peers that are still inside a collective.
    leave()
    return code


def report_end(run_dir: Path, exit_code: int, error: BaseException | None) -> None:
    """Records how this rank ended for the job's controller, if there is one."""
    attempt = attempt_of_controller()
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))
    if attempt is None or (error is None and rank):
        return
    try:
        rank_end(rank, exit_code=exit_code, error=error).write(RunDirectory(run_dir).logs(attempt))
    except OSError as failure:  # a full disk must not hide the error itself
        print(f"the end of rank {rank} could not be recorded: {failure}", file=sys.stderr)


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr
    )
    # Of this project all is logged, and the terminal shows what is not a detail; keep_log keeps the rest.
    logging.getLogger("megatron_qwen").setLevel(logging.DEBUG)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.DEBUG if os.environ.get("MQ_VERBOSE") else logging.INFO)
    from megatron_qwen.resilience.exits import exit_code_of

    directory = Path(sys.argv[1])
    sys.exit(exit_code_of(lambda: main(sys.argv[1]), report=partial(report_end, directory)))
