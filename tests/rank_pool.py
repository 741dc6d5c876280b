"""Real gloo ranks that stay up between tests: the imports are paid once, layouts come and go."""

import datetime
import gc
import itertools
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FunctionType
from typing import Any


class RankError(AssertionError):
    """A rank raised; the text holds its traceback."""


class RankPool:
    """A number of processes that are ranks of one gloo world.

    Args:
        size: world size.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
        """Calls a module-level function on every rank and returns what each answered, by rank.

        Raises:
            RankError: a rank raised, died or did not answer in time. The pool is then ended and starts anew next time.
        """
        if not self._ranks:
            self._start()
        deadline = time.monotonic() + timeout_s
        for _, pipe in self._ranks:
            pipe.send((job, arguments))
        answers: list[Any] = [None] * self.size
        waiting = set(range(self.size))
        while waiting:
            for rank in sorted(waiting):
                process, pipe = self._ranks[rank]
                if pipe.poll(0.01):
                    failed, answers[rank] = pipe.recv()
                    waiting.discard(rank)
                    if failed:
                        self.close()
                        raise RankError(f"rank {rank} of {self.size}:\n{answers[rank]}")
                elif not process.is_alive() or time.monotonic() > deadline:
                    state = f"ended with {process.exitcode}" if not process.is_alive() else "did not answer in time"
                    self.close()
                    raise RankError(f"rank {rank} of {self.size} {state}")
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def rank_info() -> Any:
    """Where the calling rank stands, for ``build_parts``."""
    import torch.distributed as dist

    from megatron_qwen.distributed.rank import RankInfo

    return RankInfo(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), "127.0.0.1", 0)


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    from megatron_qwen import device

    device.prepare()
    import torch.distributed as dist

    from megatron_qwen.distributed import groups

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
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)
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
