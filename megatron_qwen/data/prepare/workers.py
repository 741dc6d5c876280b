"""Processes that encode units: forked once the encoder is loaded, so that they share its tables."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_qwen.data.prepare.forked import garbage_left_to_the_parent
from megatron_qwen.data.prepare.part import Part, encode_unit
from megatron_qwen.data.prepare.plan import PreparationPlan, Unit
from megatron_qwen.data.tokenizers.encoder import Encoder
from megatron_qwen.data.tokenizers.tokenizer import tokenizers_without_threads
from megatron_qwen.errors import Problem, UserError

# So many units lie ready for a process beside the one it works on.
_AHEAD = 1
_NICE_S = 5.0
_TELL_S = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class WorkerDied(UserError):
    """A process ended without a word; what other units became is kept (exit 1)."""

    kind = "a worker died"


@dataclass(frozen=True)
class EncodingProgress:
    """Work done since the last word of a process."""

    read: int
    text_bytes: int
    documents: int
    tokens: int


@dataclass
class _Worker:
    process: Any
    connection: Connection
    units: list[int]


class Workers:
    """A pool of processes.

    Args:
        count: how many.
        plan: what is prepared.
        encoder: loaded already.
        units: what there is to encode; the processes know them from the fork, and are sent numbers.
    """

    def __init__(self, count: int, plan: PreparationPlan, encoder: Encoder, units: Sequence[Unit]) -> None:
        self._units = units
        context = multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            others = [worker.connection for worker in self._workers]
            process = context.Process(target=_serve, args=(theirs, [ours, *others], plan, encoder, units), daemon=True)
            with garbage_left_to_the_parent():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, []))

    def run(self) -> Iterator[Part | EncodingProgress]:
        """Has the units encoded, at once; parts come as they are finished, in any order.

        Raises:
            UserError: the first that a process met.
            WorkerDied: a process was killed.
        """
        waiting = list(reversed(range(len(self._units))))
        for _ in range(1 + _AHEAD):
            for worker in self._workers:
                self._give(worker, waiting)
        return self._words(waiting)

    def _words(self, waiting: list[int]) -> Iterator[Part | EncodingProgress]:
        while any(worker.units for worker in self._workers):
            by_connection = {worker.connection: worker for worker in self._workers if worker.units}
            for ready in wait(list(by_connection)):
                worker = by_connection[ready]  # type: ignore[index]
                word = self._hear(worker)
                if isinstance(word, BaseException):
                    raise word
                if isinstance(word, Part):
                    worker.units.pop(0)
                    self._give(worker, waiting)
                yield word

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_NICE_S)

    def _give(self, worker: _Worker, waiting: list[int]) -> None:
        if waiting:
            worker.units.append(waiting.pop())
            try:
                worker.connection.send(worker.units[-1])
            except OSError:
                self._mourn(worker)

    def _hear(self, worker: _Worker) -> Any:
        try:
            return worker.connection.recv()
        except (EOFError, OSError):
            return self._mourn(worker)

    def _mourn(self, worker: _Worker) -> None:
        worker.process.join(_NICE_S)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        span = self._units[worker.units[0]].spans[0]
        fix = f"the process that encoded it {how}; the kernel kills what needs too much memory: try fewer --workers. "
        raise WorkerDied(Problem(str(span.file.path), None, fix + "The same command goes on from here."))


def _serve(
    connection: Connection,
    foreign: Sequence[Connection],
    plan: PreparationPlan,
    encoder: Encoder,
    units: Sequence[Unit],
) -> None:
    """Encodes the units that come until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    _keep_freed_memory()
    tokenizers_without_threads()
    for one in foreign:  # else the end of the parent would go unnoticed
        one.close()

    held, told = [0, 0, 0, 0], time.monotonic()

    def tell(*counts: int) -> None:
        nonlocal told
        for index, count in enumerate(counts):
            held[index] += count
        if time.monotonic() - told > _TELL_S:
            flush()

    def flush() -> None:
        nonlocal told
        connection.send(EncodingProgress(*held))
        held[:], told = [0, 0, 0, 0], time.monotonic()

    try:
        while True:
            unit = units[connection.recv()]
            try:
                part = encode_unit(unit, plan, encoder, tell)
            except (UserError, OSError) as error:
                connection.send(error)
                return
            flush()
            connection.send(part)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception:
        connection.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))


def _keep_freed_memory() -> None:
    """Has glibc hand out freed blocks again, up to 64 MiB each, instead of asking the kernel for new zeroed pages."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
