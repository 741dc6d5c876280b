"""Real gloo ranks that stay up between tests: they are started once, layouts come and go."""

import datetime
import gc
import importlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import FunctionType
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 120.0
_NO_WORLD = "no world"


class RankError(AssertionError):
    """A rank raised; the text holds its traceback."""


class _NoWorldError(RankError):
    """The ranks did not reach one another, so the job has not begun."""


class RankPool:
    """A number of processes that are ranks of one gloo world.

    Args:
        size: world size.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
        """Calls a module-level function on every rank and returns what each answered, by rank.

        Raises:
            RankError: a rank raised, died or did not answer in time. The pool is then ended and starts anew next time.
        """
        try:
            return self._run(job, arguments, timeout_s)
        except _NoWorldError as error:
            # On a busy machine gloo's mesh has once lost a connection while it was made.
            print(f"the ranks are started again: {error}", file=sys.stderr)
            return self._run(job, arguments, timeout_s)

    def _run(self, job: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> list[Any]:
        if not self._ranks:
            self._start()
        deadline = time.monotonic() + timeout_s
        for rank, (_, pipe) in enumerate(self._ranks):
            try:
                pipe.send((job, arguments))
            except OSError:
                self.close()
                raise RankError(f"rank {rank} of {self.size} had ended before it got the job") from None
        answers: list[Any] = [None] * self.size
        waiting = set(range(self.size))
        while waiting:
            for rank in sorted(waiting):
                process, pipe = self._ranks[rank]
                if pipe.poll(0.01):
                    failed, answers[rank] = _received(pipe)
                    waiting.discard(rank)
                    if failed:
                        self.close()
                        kind = _NoWorldError if failed == _NO_WORLD else RankError
                        raise kind(f"rank {rank} of {self.size}:\n{answers[rank]}")
                elif process.poll() is not None or time.monotonic() > deadline:
                    code = process.poll()
                    state = "did not answer in time" if code is None else f"ended with {code}"
                    self.close()
                    raise RankError(f"rank {rank} of {self.size} {state}")
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.wait()
        self._ranks = []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_ROOT)}
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket", "AF_UNIX", self.size) as listener:
            listener._listener._socket.settimeout(_START_TIMEOUT_S)  # type: ignore[attr-defined]
            words = [[f"{folder}/socket", str(rank), str(self.size), str(port)] for rank in range(self.size)]
            command = [sys.executable, "-P", "-m", "tests.rank_pool"]
            processes = [subprocess.Popen([*command, *one], env=environment) for one in words]
            connected = [listener.accept() for _ in processes]
            pipes = {pipe.recv(): pipe for pipe in connected}
        self._ranks = [(process, pipes[rank]) for rank, process in enumerate(processes)]


def _received(pipe: Connection) -> tuple[bool | str, Any]:
    try:
        failed, answer = pipe.recv()
    except EOFError:
        return True, "it ended without an answer"
    return failed, answer


def rank_info() -> Any:
    """Where the calling rank stands, for ``build_components``."""
    import torch.distributed as dist

    from megatron_qwen.distributed.rank import RankInfo

    return RankInfo(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), "127.0.0.1", 0)


def _serve(address: str, rank: int, size: int, port: int) -> None:
    pipe = Client(address, "AF_UNIX")
    pipe.send(rank)
    from megatron_qwen import device
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    import torch.distributed as dist

    from megatron_qwen.distributed import groups

    for needed_by_most_jobs in ("megatron_qwen.training.attempt", "tests.distributed.jobs"):
        importlib.import_module(needed_by_most_jobs)
    # megatron-core collects garbage at every save: 0.7 s with all that was imported, nothing without.
    gc.collect()
    gc.freeze()
    device.set_threads(1)
    timeout = datetime.timedelta(minutes=4)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timeout)
    for number in itertools.count():
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        # A world for every job: groups of earlier layouts would keep their threads.
        own = dist.PrefixStore(str(number), store)
        try:
            dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)
        except RuntimeError:
            pipe.send((_NO_WORLD, traceback.format_exc()))
            return
        try:
            answer = (False, job(*arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        _forget_models()
        groups.destroy()
        dist.destroy_process_group()
        pipe.send(answer)


def _forget_models() -> None:
    """Frees the job's models and with them their process groups, whose threads wake up all the time.

    Gradient hooks tie a model to itself through autograd's nodes, where the collector does not see it.
    """
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__qualname__.startswith("DistributedDataParallel._make"):
            for cell in thing.__closure__ or ():
                cell.cell_contents = None
    gc.collect()


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
