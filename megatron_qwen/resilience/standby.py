"""A rank that has imported everything and waits for the attempt before its own to fail."""

import os
import signal
import sys
import time
from pathlib import Path

from megatron_qwen.resilience.rank_end import attempt_of_controller
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory

# What begins a waiting rank: free until NCCL starts, which uses it.
BEGIN = signal.SIGUSR1
_READY, _BEGUN = "ready", "begun"
_LOOK_S = 1.0


def is_ready(folder: Path) -> bool:
    """Whether the waiting ranks of a folder can begin; asked of rank 0, whose imports take as long as any rank's."""
    return (folder / _READY).exists()


def has_begun(folder: Path) -> bool:
    """Whether rank 0 has begun."""
    return (folder / _BEGUN).exists()


def wait_for_turn(run_dir: Path, folder: Path, signals: StopSignals) -> float:
    """Imports what a rank needs, and returns when its attempt begins; its output goes to the logs of that attempt then.

    Exits with 0 if it is told to stop, if what started it ends, or if an import has begun to use the GPU, whose memory
    belongs to the ranks that run.

    Args:
        run_dir: the run.
        folder: where rank 0 says that it is ready, and that it has begun.
        signals: installed already.

    Returns:
        When the attempt began for this rank, seconds since 1970.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {BEGIN})  # before the imports: it stays pending while they run
    parent = os.getppid()
    if _uses_gpu_after_imports():
        print("not kept ready: an import has started CUDA, and would hold memory of the GPU", file=sys.stderr)
        sys.exit(0)
    rank = os.environ.get("SLURM_PROCID", "0")
    if rank == "0":
        (folder / _READY).touch()
    while signal.sigtimedwait({BEGIN}, _LOOK_S) is None:
        if signals.received is not None or os.getppid() != parent:
            sys.exit(0)
    begun = time.time()
    if rank == "0":
        (folder / _BEGUN).touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {BEGIN})
    attempt = attempt_of_controller()
    if attempt is not None:
        _write_output_to(RunDirectory(run_dir).logs(attempt) / f"rank_{rank}.log")
    return begun


def _uses_gpu_after_imports() -> bool:
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    import torch

    import megatron_qwen.recipes.registry
    import megatron_qwen.training.attempt  # noqa: F401

    return torch.cuda.is_initialized()


def _write_output_to(path: Path) -> None:
    """As srun's --output and --error with --open-mode=append, which name another file for a rank that waits."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
