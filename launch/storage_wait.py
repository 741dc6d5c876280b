"""Whether a run that is in the queue waits because its file system is full or read-only: nothing else frees it."""

import os
from pathlib import Path

from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.slurm import QueuedJob

_NOTED = f"{Reason.STORAGE}: "
# As much as the small files of an attempt need; what a checkpoint needs is not known here.
_LEAST_BYTES = 1 << 20


def storage_fault(run: Path, noted: str, job: QueuedJob | None) -> str:
    """What is wrong with the file system that a waiting run needs; empty if nothing is known to be.

    Args:
        run: its directory.
        noted: the reason in status.json. A full disk may have kept it from being written.
        job: which then has the end of the attempt as its comment.
    """
    if noted.startswith(_NOTED):
        return noted.removeprefix(_NOTED)
    kept = EndOfAttempt.from_text(job.comment) if job is not None else None
    if kept is not None and kept.facts.get("reason") == Reason.STORAGE:
        return str(kept.facts.get("detail") or kept.why)
    try:
        state = os.statvfs(run)
    except OSError as error:
        return f"{error.strerror} in {run}"
    if state.f_flag & os.ST_RDONLY:
        return f"the file system of {run} is read-only"
    return f"no room is left in {run}" if state.f_bavail * state.f_frsize < _LEAST_BYTES else ""
