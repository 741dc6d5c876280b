"""Writes local checkpoints: a copy in host memory, then a thread that writes it here and sends it to the partner.

Training waits for the copy, and for the local checkpoint before where that is not written yet. A set of pieces counts
once all ranks have theirs; until the next set is whole the one before stays.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.checkpoint.local import nodes
from megatron_qwen.checkpoint.local.exchange import PartnerExchange
from megatron_qwen.checkpoint.local.piece import PieceName, PieceWriter, StagedPiece
from megatron_qwen.files import is_temporary

log = logging.getLogger(__name__)
# A rank that fails writes why it ends, and its launcher gives the others 20 s for that (job/local_ranks.py).
_LEAVE_S = 10.0
# How long training waits for the local checkpoint before: with a shorter interval than a write takes it has to wait, or
# a fault would lose more than the interval. Chosen by hand.
_PATIENCE_S = 30.0


@dataclass
class _Save:
    """A local checkpoint that this rank has begun.

    Args:
        iteration: its number.
        thread: that writes it.
        own_failure: why this rank's piece was not written, empty if it was.
        held_failure: why the partner's piece is not here.
        group_failure: why partners could not be reached, after which their group is of no use.
    """

    iteration: int
    thread: threading.Thread | None = None
    own_failure: str = ""
    held_failure: str = ""
    group_failure: str = ""


class LocalCheckpointWriter:
    """The local checkpoints of one attempt on this rank. Every method but ``close`` is called by all ranks together.

    Args:
        directory: of the run's pieces on this node.
        attempt: number of this attempt.
        layout: hash of how the state is divided over ranks.
        partners: ranks that keep copies for one another; only this one if there is no other node.
    """

    def __init__(self, directory: Path, *, attempt: int, layout: str, partners: tuple[int, ...]) -> None:
        self.directory, self.attempt, self.layout = directory, attempt, layout
        self._exchange = PartnerExchange(partners, attempt=attempt) if len(partners) > 1 else None
        self._staged = StagedPiece()
        self._last: _Save | None = None
        self._told: set[str] = set()
        self._patience_s = _PATIENCE_S
        for path in directory.iterdir() if directory.is_dir() else ():
            if is_temporary(path):  # of an attempt that was killed
                path.unlink(missing_ok=True)

    def save(
        self, iteration: int, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]], facts: Mapping[str, Any]
    ) -> bool:
        """Copies the tensors and begins to write them.

        Args:
            iteration: of the run.
            tensors: of this rank, as ``StagedPiece.fill`` takes them.
            facts: what else a resume needs, as JSON can hold it.

        Returns:
            False where ranks do not get the one before written, and this one is left out.
        """
        if not self._settle():
            return False
        started = time.perf_counter()
        self._staged.fill(tensors, facts)
        save = _Save(iteration)
        copied_s = time.perf_counter() - started
        # A daemon: a process that ends by an error does not wait for it, and nothing is a piece before its last rename.
        save.thread = threading.Thread(
            target=self._write, args=(save, copied_s), name=f"local-{iteration}", daemon=True
        )
        save.thread.start()
        self._last = save
        return True

    def discard(self) -> None:
        """Removes the run's pieces from this node: a newer checkpoint has all of it, or they must not be used."""
        if self._last is not None and self._last.thread is not None:
            self._last.thread.join(_PATIENCE_S)
        _anywhere(False)  # until all ranks are here, one of this node might still write
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Lets a piece that is being written be finished, within reason; ranks that are gone are not waited for."""
        if self._last is not None and self._last.thread is not None:
            self._last.thread.join(_LEAVE_S)

    def _settle(self) -> bool:
        """Whether a new set may be begun; then the one before, if every rank has it, replaces those before it."""
        last = self._last
        if last is None:
            return True
        assert last.thread is not None
        last.thread.join(self._patience_s)
        busy, missing, uncopied, alone = _anywhere(
            last.thread.is_alive(), bool(last.own_failure), bool(last.held_failure), bool(last.group_failure)
        )
        if busy:
            self._patience_s = 0.0  # a disk that hangs must not hold the run up again and again
            self._warn("a local checkpoint is left out, because the one before is still being written: use a longer %s")
            return False
        last.thread.join()
        self._last = None
        for failure in filter(None, (last.own_failure, last.held_failure, last.group_failure)):
            log.warning("rank %d: local checkpoint %d: %s", dist.get_rank(), last.iteration, failure)
        if alone or uncopied:
            self._warn("local checkpoints are not all copied to other nodes: see the warnings of the ranks (%s)")
        if alone:
            self._exchange = None  # every rank in the same step, or some would wait for others
        self._clear(lambda name: self._is_older(name, last) if not missing else self._is_of(name, last))
        return True

    def _is_older(self, name: PieceName, whole: _Save) -> bool:
        """Whether a whole set replaces this piece; pieces of earlier attempts are no longer needed either."""
        return name.iteration < whole.iteration or name.attempt != self.attempt

    def _is_of(self, name: PieceName, failed: _Save) -> bool:
        """Whether it belongs to a set that not every rank has: it takes memory and cannot be used."""
        return (name.iteration, name.attempt) == (failed.iteration, self.attempt)

    def _clear(self, is_obsolete: Callable[[PieceName], bool]) -> None:
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            name = PieceName.of(path.name)
            if name is not None and is_obsolete(name):
                path.unlink(missing_ok=True)  # another rank of this node may have been faster

    def _warn(self, text: str) -> None:
        """Once an attempt, on rank 0."""
        if dist.get_rank() == 0 and text not in self._told:
            self._told.add(text)
            log.warning(text, "checkpoint.local_interval")

    def _write(self, save: _Save, copied_s: float) -> None:
        """Runs in a thread. Whatever fails here, the partner is not left waiting."""
        started = time.perf_counter()
        name = self._write_own(save)
        if self._exchange is not None:
            try:
                self._exchange.swap(self._staged, name, self.directory)
            except OSError as error:
                save.held_failure = f"the partner's piece was not written: {error}"
            except Exception as error:
                save.group_failure = f"the partner did not answer: {error}"
        log.debug(
            "local checkpoint %d: %.1f MiB, copied in %.3f s, written%s in %.3f s",
            *(save.iteration, self._staged.size / 2**20, copied_s),
            *("" if self._exchange is None else " and sent", time.perf_counter() - started),
        )

    def _write_own(self, save: _Save) -> PieceName:
        try:
            nodes.make_private(self.directory)
        except OSError as error:
            save.own_failure = str(error)
        writer = PieceWriter(self.directory)
        for chunk in self._staged.chunks():
            writer.write(chunk)
        name = PieceName(
            save.iteration, self.attempt, dist.get_rank(), dist.get_world_size(), self.layout, writer.digest()
        )
        if save.own_failure:
            writer.abandon()
            return name
        try:
            writer.finish(name)
        except OSError as error:
            save.own_failure = str(error)
        return name


def _anywhere(*flags: bool) -> list[bool]:
    """Of each flag, whether any rank has it."""
    found = torch.tensor(flags, dtype=torch.int32, device=device.current())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]
