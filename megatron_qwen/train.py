"""Entry of a rank: join, build, load, fit, leave. ``mq train`` starts it; so do srun and torchrun.

python -m megatron_qwen.train RUN_DIR
python -m megatron_qwen.train RUN_DIR --replay STEP [--json]
python -m megatron_qwen.train RUN_DIR --standby FOLDER
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from megatron_qwen.resilience.standby import block_begin, wait_for_turn

if __name__ == "__main__" and "--standby" in sys.argv:
    block_begin()  # before torch is imported, which takes a while on a node that has not read it yet

# Before torch imports tqdm: bars of libraries do not belong into the log of a rank.
os.environ.setdefault("TQDM_DISABLE", "1")

from megatron_qwen import device
from megatron_qwen.core_patches.install import prepare_process
from megatron_qwen.errors import EXIT_FAILURE
from megatron_qwen.log_lines import LogFormatter
from megatron_qwen.resilience import dump_watch, stack_dump
from megatron_qwen.resilience.rank_end import attempt_of_controller, rank_end
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory

if TYPE_CHECKING:
    from megatron_qwen.config.run import RunConfig

_OURS = "megatron_qwen"
_STANDBY = "--standby"


def main(run_dir: str, *options: str, signals: StopSignals, started: float | None = None) -> int:
    """Runs one rank of the run in ``run_dir`` and returns its exit code.

    Args:
        run_dir: the run.
        options: --replay and a step: takes steps again up to this one and compares them, and writes nothing; --json.
        signals: installed already.
        started: when this attempt began for the process, seconds since 1970; None is the start of the process.
    """
    stack_dump.install()
    # Before Blackwell, overlap of tensor-parallel communication needs kernels to start in the order of their launch,
    # which a single hardware queue guarantees (megatron-core requires it with sequence parallelism).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    prepare_process()
    from megatron_qwen.config.checks import require_legal
    from megatron_qwen.config.source import resolve
    from megatron_qwen.distributed import flight_recorder
    from megatron_qwen.distributed.rank import RankInfo, join, leave
    from megatron_qwen.recipes.registry import RECIPES
    from megatron_qwen.resilience.parent import die_with_launcher
    from megatron_qwen.training.attempt import run_attempt

    die_with_launcher()
    info = RankInfo.from_environment()
    if (attempt := attempt_of_controller()) is not None:
        logs = RunDirectory(run_dir).logs(attempt)
        flight_recorder.prepare(logs)
        dump_watch.DumpWatch(
            logs,
            local_rank=info.local_rank,
            local_size=info.local_world_size,
            nodes=info.world_size // info.local_world_size,
            record=partial(flight_recorder.write, dump_watch.trace_file(logs, info.rank)),
        ).start()
    config = resolve(str(Path(run_dir) / "run.yaml"), [], RECIPES)
    require_legal(config, world_size=info.world_size)
    device.set_threads(config.performance.threads_per_rank or device.fair_threads(info.local_world_size))
    join(info, timeout_minutes=config.parallel.distributed_timeout_minutes)
    if "--replay" in options:
        code = _replay(config, Path(run_dir), options)
    else:
        code = run_attempt(config, info, signals, Path(run_dir), started=started or psutil.Process().create_time())
    # Only after a normal end: destroying the group would wait for peers that are still inside a collective.
    leave()
    return code


def load() -> bool:
    """Imports what ``main`` needs; returns whether that has begun to use a GPU."""
    prepare_process()
    import megatron_qwen.recipes.registry
    import megatron_qwen.training.attempt  # noqa: F401

    return device.in_use()


def _replay(config: "RunConfig", run_dir: Path, options: Sequence[str]) -> int:
    """Replays on this rank; rank 0 prints the report. Exit code 1 if a step differs from what the run recorded."""
    from megatron_qwen.distributed.rank import RankInfo
    from megatron_qwen.training.replay import describe, replay

    steps, hashes = replay(config, run_dir, int(options[options.index("--replay") + 1]))
    if RankInfo.from_environment().rank == 0:
        print(describe(steps, hashes, as_json="--json" in options), flush=True)
    return EXIT_FAILURE if any(step.equal is False for step in steps) else 0


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


def set_up_log(stream: TextIO, environ: Mapping[str, str] = os.environ) -> None:
    """Logs to the terminal, or to the file that a controller has made of this rank's output.

    Args:
        stream: the output of this rank.
        environ: MQ_VERBOSE shows details on a terminal. A controller's ranks log them always: their output is the only
            log that is kept (without one, ``keep_log`` writes a file with all of it).
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    details = bool(environ.get("MQ_VERBOSE")) or attempt_of_controller(environ) is not None
    # Details of this project only: libraries have thousands of them.
    handler.addFilter(lambda record: record.levelno >= logging.INFO or (details and _is_ours(record)))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger(_OURS).setLevel(logging.DEBUG)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OURS


if __name__ == "__main__":
    # Before the imports, which take seconds: a stop signal may arrive while they run.
    told = StopSignals()
    told.install()
    set_up_log(sys.stderr)
    directory, begun = Path(sys.argv[1]), None
    if _STANDBY in sys.argv:
        logs = RunDirectory(directory).logs(attempt_of_controller() or 0)
        begun = wait_for_turn(Path(sys.argv[sys.argv.index(_STANDBY) + 1]), logs, told, load)
    from megatron_qwen.resilience.exits import exit_code_of

    program = partial(main, *sys.argv[1:], signals=told, started=begun)
    sys.exit(exit_code_of(program, report=partial(report_end, directory)))
