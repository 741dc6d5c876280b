"""Writes checkpoints: all files under a temporary name, then the manifest, the rename, and ``latest``.

The order makes a checkpoint either whole or absent, whenever the job is killed:

1. All ranks write into ``.iter_N.attempt_A.tmp``. The name holds the attempt, so two attempts never share a directory.
2. Each rank hashes the files it wrote, right after writing them.
3. Rank 0 writes manifest.json last and syncs the tree: a manifest never names bytes that are not on disk.
4. The rename publishes the directory. A directory named ``iter_N`` is therefore complete.
5. ``latest`` names it, and old checkpoints are deleted.

A rank of a superseded attempt may still run, as on a node that lost slurmd but not its processes. So rank 0 checks,
under the lock of attempts.jsonl, that its attempt is still the newest: no attempt can start between check and rename.
"""

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qwen import device
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import LATEST, committed, iteration_dir, temporary_dir
from megatron_qwen.checkpoint.retain import prune
from megatron_qwen.core_patches import results_queue
from megatron_qwen.errors import Problem, UserError
from megatron_qwen.files import atomic_write, publish, sync_tree

log = logging.getLogger(__name__)
# torch's zip writer does not report a full disk as such: it fails with "unexpected pos".
_FULL_SIGNS = ("No space left", "unexpected pos")
# With less than this free after a failed write, a full disk is the likely cause whatever the error says. Chosen by
# hand.
_FULL_BYTES = 1 << 20
_OPTIMIZER = "optimizer."


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are untouched (exit 1)."""

    kind = "checkpoint not saved"


@dataclass
class _Pending:
    """A save that this rank has started and not yet committed."""

    iteration: int
    directory: Path
    request: Any
    started: float
    thread: threading.Thread | None = None
    failure: list[BaseException] = field(default_factory=list)
    entries: dict[str, manifest.FileEntry] = field(default_factory=dict)


class CheckpointWriter:
    """Saves and commits the checkpoints of one attempt of a run. Every method is called by all ranks together.

    Args:
        root: the run's checkpoints directory.
        attempt: number of this attempt; part of the names of temporary directories.
        attempts: the run's attempts.jsonl; an attempt that is not the newest commits nothing.
        keep_last: newest checkpoints to keep.
        keep_every: multiples of this many iterations are never deleted.
        keep_at: iterations whose checkpoints are never deleted.
    """

    def __init__(
        self,
        root: Path,
        *,
        attempt: int,
        attempts: AttemptLog,
        keep_last: int,
        keep_every: int | None,
        keep_at: Sequence[int] = (),
    ) -> None:
        self.root, self.attempt, self.attempts = root, attempt, attempts
        self.keep_last, self.keep_every, self.keep_at = keep_last, keep_every, keep_at
        self.newest: int | None = None  # iteration of the newest checkpoint that this attempt has committed
        self._pending: _Pending | None = None
        self._results = results_queue.apply()

    def save(
        self, iteration: int, state: dict[str, Any], write_small_files: Callable[[Path], None], *, background: bool
    ) -> None:
        """Saves a checkpoint. In the background, training continues and a later ``finish`` commits it.

        Args:
            iteration: its number.
            state: megatron-core's sharded state.
            write_small_files: writes the files that are not sharded into the directory it is given, on rank 0.
            background: return as soon as the tensors are copied.

        Raises:
            SaveError: the disk is full or a write failed, on any rank; earlier checkpoints are untouched.
        """
        self.finish()
        directory = temporary_dir(self.root, iteration, self.attempt)
        started = time.monotonic()
        _drain(self._results)
        self._together(lambda: self._prepare(directory), directory)
        self._together(lambda: write_small_files(directory), directory)
        request = dist_checkpointing.save(
            state, str(directory), async_sharded_save=True, async_strategy="mcore", validate_access_integrity=False
        )
        pending = _Pending(iteration, directory, request, started)
        write = self._writer(pending, copy=background)
        if background:
            pending.thread = threading.Thread(target=write, name=f"checkpoint-{iteration}")
            pending.thread.start()
        else:
            write()
        self._pending = pending
        if not background:
            self.finish()

    def is_written(self) -> bool:
        """Whether there is a pending checkpoint of which all ranks have written their part: only the commit is left."""
        pending = self._pending
        return pending is not None and _all_agree(pending.thread is None or not pending.thread.is_alive())

    def finish(self) -> Path | None:
        """Commits the pending checkpoint, if there is one; waits until all ranks have written their part.

        Returns:
            The committed directory, or None.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.thread is not None:
            pending.thread.join()
        self._pending = None
        self._together(lambda: _reraise(pending.failure), pending.directory)
        self._together(lambda: _finalize(pending.request), pending.directory)
        return self._commit(pending)

    def _prepare(self, directory: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)

    def _writer(self, pending: _Pending, *, copy: bool) -> Callable[[], None]:
        request = pending.request
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            # From a GPU megatron-core has copied the tensors to the host already.
            arguments[1] = _staged(request.preload_fn(), copy=copy and not device.has_cuda())

        def write() -> None:
            try:
                if request.async_fn is not None:
                    request.async_fn(*arguments, **request.async_fn_kwargs)
                    cuts = _weight_cuts(_check_result(arguments[2]))
                    for path in pending.directory.glob(f"__{dist.get_rank()}_*"):
                        pending.entries[path.name] = manifest.hash_file(path, cuts.get(path.name, ()))
            except BaseException as error:
                pending.failure.append(error)

        return write

    def _together(self, action: Callable[[], None], directory: Path) -> None:
        """Runs ``action`` on every rank; if it fails on any, all raise SaveError and the directory is removed.

        Without this a rank that fails alone would leave the others waiting in their next collective.
        """
        failure = ""
        try:
            action()
        except (Exception, CheckpointException) as error:  # torch's CheckpointException derives from BaseException
            failure = f"rank {dist.get_rank()}: {error}"
        if _all_agree(not failure):
            return
        failures: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        raise self._failure(next(text for text in failures if text), directory)

    def _failure(self, cause: str, directory: Path) -> SaveError:
        """The same error on every rank; the unfinished checkpoint is removed."""
        text = [cause]
        if dist.get_rank() == 0:
            full = shutil.disk_usage(self.root).free < _FULL_BYTES or any(sign in cause for sign in _FULL_SIGNS)
            written = _size(directory)
            shutil.rmtree(directory, ignore_errors=True)
            if full:
                earlier = committed(self.root)
                needed = max(written, _size(earlier[0][1]) if earlier else 0)
                free = shutil.disk_usage(self.root).free
                text[0] = (
                    f"No space left on device: the checkpoint needs about {needed / 2**20:.1f} MiB and "
                    f"{free / 2**20:.1f} MiB are free. Free some space and start the run again"
                )
        dist.broadcast_object_list(text)
        return SaveError(Problem(str(directory), None, f"{text[0]}. Earlier checkpoints are untouched."))

    def _commit(self, pending: _Pending) -> Path:
        directory, final = pending.directory, iteration_dir(self.root, pending.iteration)
        entries: dict[str, manifest.FileEntry] = {}

        def commit() -> None:
            entries.update(self._hash_written(pending))
            if dist.get_rank() != 0:
                return
            self._require_current()
            manifest.write(directory, entries, iteration=pending.iteration, attempt=self.attempt)
            sync_tree(directory)
            # The lock keeps a new attempt from starting between the check and the rename.
            with self.attempts.exclusive():
                self._require_current()
                if final.exists():
                    shutil.rmtree(final)
                publish(directory, final, durable=True)
                atomic_write(self.root / LATEST, final.name + "\n", durable=True)
            self._prune(pending.iteration)

        self._together(commit, directory)
        self.newest = pending.iteration
        if dist.get_rank() == 0:
            size = sum(entry.size for entry in entries.values())
            log.info("saved %s, %.1f MiB in %.1f s", final, size / 2**20, time.monotonic() - pending.started)
        return final

    def _require_current(self) -> None:
        if self.attempts.newest() != self.attempt:
            raise RuntimeError(
                f"attempt {self.attempt} was superseded by a newer attempt and must not commit a checkpoint"
            )

    def _prune(self, newest: int) -> None:
        try:
            prune(self.root, newest=newest, keep_last=self.keep_last, keep_every=self.keep_every, keep_at=self.keep_at)
        except OSError as error:  # the new checkpoint is committed; a leftover old one is only a warning
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _hash_written(self, pending: _Pending) -> dict[str, manifest.FileEntry]:
        """Size and hashes of every file: each rank hashed what it wrote, rank 0 the rest."""
        shares: list[dict[str, manifest.FileEntry]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, pending.entries)
        entries = {name: entry for share in shares for name, entry in share.items()}
        if dist.get_rank() == 0:
            rest = [name for name in manifest.files_in(pending.directory) if name not in entries]
            entries |= {name: manifest.hash_file(pending.directory / name) for name in rest}
        return entries


def _staged(buckets: list[Any], *, copy: bool) -> list[Any]:
    """The tensors to write, with a copy of those that training changes while a background save writes them.

    Only model weights need the copy: the optimizer's tensors were gathered into buffers of their own
    (core_patches/state_gather.py).
    """
    if not copy:
        return buckets

    def apart(item: Any, tensor: Any) -> Any:
        changes = isinstance(tensor, torch.Tensor) and not item.index.fqn.startswith(_OPTIMIZER)
        return tensor.clone() if changes else tensor

    return [
        (name, key, (plain, [(item, apart(item, tensor)) for item, tensor in tensors]))
        for name, key, (plain, tensors) in buckets
    ]


def _check_result(results: "queue.Queue[Any]") -> Any:
    """Reads the result that megatron-core put into its queue, and puts it back: megatron-core reads it as well."""
    outcome = results.get_nowait()
    results.put(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _weight_cuts(written: Any) -> dict[str, list[int]]:
    """For each file, the byte offsets at which slices of weights begin and end, from megatron-core's write results.

    They become parts of the manifest with hashes of their own, so that an export verifies the weights without reading
    the optimizer state.
    """
    cuts: dict[str, list[int]] = {}
    results = [result for bucket in written.values() for result in bucket] if isinstance(written, dict) else written
    for result in results:
        stored = result.storage_data
        if result.index.offset is not None and not result.index.fqn.startswith(_OPTIMIZER):
            cuts.setdefault(str(stored.relative_path), []).extend((stored.offset, stored.offset + stored.length))
    return cuts


def _drain(results: "queue.Queue[Any]") -> None:
    while not results.empty():
        results.get_nowait()


def _reraise(failures: list[BaseException]) -> None:
    if failures:
        raise RuntimeError(str(failures[0])) from failures[0]


def _finalize(request: Any) -> None:
    """megatron-core's own end of a save: rank 0 gathers the write results and writes .metadata and metadata.json.

    If rank 0 cannot write, it still joins the collective in which the other ranks wait: else they would hang.
    """
    joins: tuple[Callable[[], Any], ...] = (_announce_failure, dist.barrier)
    for finalize, join_peers in zip(request.finalize_fns, joins, strict=True):
        try:
            finalize()
        except OSError:
            join_peers()
            raise


def _announce_failure() -> None:
    dist.broadcast(torch.ones(1, dtype=torch.int, device=device.current()), src=0)


def _all_agree(flag: bool) -> bool:
    """Whether it is true on every rank; asked in every step while a save is written in the background."""
    agreed = torch.tensor([int(flag)], dtype=torch.int32, device=device.current())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def _size(directory: Path) -> int:
    """Bytes of all files in a directory, 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
