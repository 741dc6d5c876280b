"""Which checkpoints are kept, and the deletion of the others."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.checkpoint.paths import MANIFEST, abandoned, committed


def superseded(
    iterations: list[int], *, keep_last: int, keep_every: int | None, keep_at: Sequence[int] = ()
) -> list[int]:
    """Iterations to delete: neither among the newest nor kept permanently.

    A skipped step is not saved. If an iteration of ``keep_at`` was skipped, the next checkpoint is kept in its place.
    """
    newest = sorted(iterations, reverse=True)[:keep_last]
    keep_at = [min((one for one in iterations if one >= wanted), default=wanted) for wanted in keep_at]
    return [
        iteration
        for iteration in iterations
        if iteration not in (*newest, *keep_at) and not (keep_every and iteration % keep_every == 0)
    ]


def prune(
    root: Path, *, newest: int, keep_last: int, keep_every: int | None, keep_at: Sequence[int] = ()
) -> list[Path]:
    """Deletes superseded checkpoints and returns their paths.

    The manifest is deleted first: a checkpoint whose deletion is interrupted is then recognised as incomplete.

    Args:
        root: the run's checkpoints directory.
        newest: the iteration just committed. Later checkpoints come from before the run fell back to an older one; they
            do not count as newest and are not deleted.
        keep_last: newest checkpoints to keep.
        keep_every: multiples of this many iterations are kept for good.
        keep_at: iterations that are kept for good.
    """
    found = {iteration: path for iteration, path in committed(root) if iteration <= newest}
    old = superseded(list(found), keep_last=keep_last, keep_every=keep_every, keep_at=keep_at)
    gone = [found[iteration] for iteration in old]
    for path in gone:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    return gone


def clear_abandoned(root: Path) -> None:
    """Removes what earlier attempts left unfinished."""
    for path in abandoned(root):
        shutil.rmtree(path, ignore_errors=True)
