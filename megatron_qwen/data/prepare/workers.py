"""Worker processes that encode units. They are forked after the encoder is loaded, so they share its tables."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_qwen import process_settings
from megatron_qwen.data.prepare.forked import garbage_left_to_the_parent
from megatron_qwen.data.prepare.part import encode_unit
from megatron_qwen.data.prepare.part_file import Part
from megatron_qwen.data.prepare.plan import PreparationPlan, Unit
from megatron_qwen.data.tokenizers.encoder import Encoder
from megatron_qwen.data.tokenizers.tokenizer import tokenizers_without_threads
from megatron_qwen.errors import Problem, UserError

# Units queued for a worker in addition to the one it encodes, so that it never waits for the next.
_AHEAD = 1
# Bound on the wait for a worker that was told to end or whose pipe broke. One that hangs is a daemon, which the
# interpreter ends at its own exit. Chosen by hand.
_JOIN_TIMEOUT_S = 5.0
# Progress goes through the pipe at most ten times a second: a terminal shows no more (tools/data/prepare.py, 0.2 s).
_TELL_S = 0.1
# Of freed memory a process keeps blocks of up to 32 MiB, 64 MiB in all: it shares its machine with the others.
_KEPT_BLOCK_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20


class WorkerDied(UserError):
    """A worker process died; finished parts are kept (exit 1)."""

    kind = "a worker died"


@dataclass(frozen=True)
class EncodingProgress:
    """Work done since the last report of a worker."""

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
    """A pool of worker processes.

    Args:
        count: how many.
        plan: of the preparation.
        encoder: loaded already.
        units: what to encode; workers have them from the fork and are sent indices only.
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
        """Starts encoding at once; yields progress, and parts as they are finished, in any order.

        Raises:
            UserError: the first error of a worker.
            WorkerDied: a worker was killed.
        """
        waiting = list(reversed(range(len(self._units))))
        for _ in range(1 + _AHEAD):
            for worker in self._workers:
                self._give(worker, waiting)
        return self._messages(waiting)

    def _messages(self, waiting: list[int]) -> Iterator[Part | EncodingProgress]:
        while any(worker.units for worker in self._workers):
            by_connection = {worker.connection: worker for worker in self._workers if worker.units}
            for ready in wait(list(by_connection)):
                worker = by_connection[ready]  # type: ignore[index]
                message = self._receive(worker)
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Part):
                    worker.units.pop(0)
                    self._give(worker, waiting)
                yield message

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_JOIN_TIMEOUT_S)

    def _give(self, worker: _Worker, waiting: list[int]) -> None:
        if waiting:
            worker.units.append(waiting.pop())
            # A worker that has ended is noticed when its messages are read: before the end may be the reason.
            with contextlib.suppress(OSError):
                worker.connection.send(worker.units[-1])

    def _receive(self, worker: _Worker) -> Any:
        try:
            return worker.connection.recv()
        except (EOFError, OSError):
            return self._raise_died(worker)

    def _raise_died(self, worker: _Worker) -> None:
        worker.process.join(_JOIN_TIMEOUT_S)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        span = self._units[worker.units[0]].spans[0]
        fix = f"the process that encoded it {how}; if the machine ran out of memory, use fewer --workers. "
        raise WorkerDied(Problem(str(span.file.path), None, fix + "Run the same command again to resume."))


def _serve(
    connection: Connection,
    foreign: Sequence[Connection],
    plan: PreparationPlan,
    encoder: Encoder,
    units: Sequence[Unit],
) -> None:
    """A worker: encodes the units it is sent until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    process_settings.keep_freed_memory(largest_block=_KEPT_BLOCK_BYTES, most_free=_KEPT_BYTES)
    tokenizers_without_threads()
    for one in foreign:  # inherited ends would keep the pipe open after the parent's death
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
