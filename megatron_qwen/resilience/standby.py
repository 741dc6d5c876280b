"""A rank that has imported everything and waits for the attempt before its own to fail."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_qwen.resilience.signals import StopSignals

# What begins a waiting rank: free until NCCL starts, which uses it.
BEGIN = signal.SIGUSR1
_READY, _BEGUN = "ready", "begun"
_LOOK_S = 1.0
# Every rank looks for the folder on a shared file system, so not often: 300 times a second for 10,000 ranks.
_FOLDER_LOOK_S = 30.0


def lay_out(folder: Path) -> None:
    """Makes the folder through which waiting ranks are heard.

    Its files are there from the start: a network file system may hide a new name for a minute, but not what is in a
    file that is opened.
    """
    folder.mkdir(exist_ok=True)
    for name in (_READY, _BEGUN):
        (folder / name).write_bytes(b"")


def is_ready(folder: Path) -> bool:
    """Whether the waiting ranks of a folder can begin; asked of rank 0, whose imports take as long as any rank's."""
    return _says(folder / _READY)


def has_begun(folder: Path) -> bool:
    """Whether rank 0 has begun."""
    return _says(folder / _BEGUN)


def _says(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except FileNotFoundError:
        return False


def block_begin() -> None:
    """Has the signal that begins a rank wait until the rank does; its default would end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {BEGIN})


def wait_for_turn(folder: Path, logs: Path, signals: StopSignals, load: Callable[[], bool]) -> float:
    """Imports what a rank needs, and returns when its attempt begins; its output goes to the logs of that attempt then.

    Exits with 0 if it is told to stop, if what started it ends, if the folder is removed (on a node that has lost its
    slurmd nobody can end it otherwise), or if an import has begun to use the GPU, whose memory belongs to the ranks
    that run.

    Args:
        folder: where rank 0 says that it is ready, and that it has begun.
        logs: directory of the logs of the attempt.
        signals: installed already.
        load: imports all, and returns whether that has begun to use a GPU.

    Returns:
        When the attempt began for this rank, seconds since 1970.
    """
    block_begin()  # here at the latest: it stays pending while the imports run
    parent = os.getppid()
    if load():
        print("not kept ready: an import has started CUDA, and would hold memory of the GPU", file=sys.stderr)
        sys.exit(0)
    rank = os.environ.get("SLURM_PROCID", "0")
    if not folder.is_dir():
        sys.exit(0)
    if rank == "0":
        (folder / _READY).write_bytes(b"1")
    looked = time.monotonic()
    while signal.sigtimedwait({BEGIN}, _LOOK_S) is None:
        if signals.received is not None or os.getppid() != parent:
            sys.exit(0)
        if time.monotonic() - looked > _FOLDER_LOOK_S:
            looked = time.monotonic()
            if not folder.is_dir():
                sys.exit(0)
    begun = time.time()
    if rank == "0":
        (folder / _BEGUN).write_bytes(b"1")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {BEGIN})
    _write_output_to(logs / f"rank_{rank}.log")
    return begun


def _write_output_to(path: Path) -> None:
    """As srun's --output and --error with --open-mode=append, which name another file for a rank that waits."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
