"""What a controller writes about attempts, and reads of them, on a file system that may fail at any moment."""

import contextlib
import logging
import time

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.job.allocation import JobAllocation
from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.resilience.storage import is_fault
from megatron_qwen.rundir import RunDirectory, RunState

log = logging.getLogger(__name__)
# After a requeue Slurm sends SIGKILL KillWait seconds after SIGTERM, 30 by default; the cluster of tests/slurm has 15.
_LATE_S, _POLL_S = 10.0, 0.5


class AttemptRecords:
    """The ends of attempts, in attempts.jsonl and status.json. What follows an attempt does not depend on them.

    Args:
        directory: of the run.
        attempts: its attempts.jsonl.
        allocation: whose scheduler keeps a word where no file can be written.
    """

    def __init__(self, directory: RunDirectory, attempts: AttemptLog, allocation: JobAllocation) -> None:
        self._directory, self._attempts, self._allocation = directory, attempts, allocation
        self._left: tuple[EndOfAttempt, RunState] | None = None  # what the file system did not take
        self._saved = 0

    def is_superseded(self, number: int) -> bool:
        """Whether a newer attempt has begun. A file that cannot be read at the moment says nothing of the kind."""
        try:
            return self._directory.is_superseded(number)
        except OSError as error:
            if not is_fault(error, self._directory.path):
                raise
            return False

    def newest_saved(self) -> int:
        """The newest committed iteration; what was seen last where the file system does not answer."""
        with contextlib.suppress(OSError):
            found = committed(self._directory.checkpoints)
            self._saved = found[0][0] if found else 0
        return self._saved

    def last_good(self) -> str | None:
        """The newest checkpoint; None where there is none, or none can be seen."""
        with contextlib.suppress(OSError):
            found = committed(self._directory.checkpoints)
            return str(found[0][1]) if found else None
        return None

    def note(self, end: EndOfAttempt, state: RunState) -> None:
        """Writes the end of an attempt and the state of the run, or remembers them."""
        try:
            self.write(end, state)
        except OSError as error:
            if not is_fault(error, self._directory.path):
                raise
            log.error("the end of attempt %d cannot be written yet (%s)", end.number, error.strerror)
            self._left = end, state

    def write_what_is_left(self) -> None:
        """Writes what was remembered."""
        if self._left is not None:
            self.write(*self._left)
            self._left = None

    def write_late(self) -> None:
        """The same when the job has been requeued, as long as there is time; its next start has it from Slurm then."""
        deadline, kept = time.monotonic() + _LATE_S, False
        while self._left is not None and time.monotonic() < deadline:
            try:
                self.write_what_is_left()
            except OSError:
                if not kept:
                    self._allocation.keep(self._left[0].as_text())
                    kept = True
                time.sleep(_POLL_S)

    def write(self, end: EndOfAttempt, state: RunState | None) -> None:
        """Writes the end of an attempt, once, and the state of the run if it is still this attempt's to say."""
        there = self._attempts.read()
        if not any(one.number == end.number and one.ended is not None for one in there):
            self._attempts.end(end.number, **end.facts)
        # It is another's if an attempt has begun since, or if a person has submitted the run again meanwhile.
        newer = any(one.number > end.number for one in there)
        if state is None or newer or self._directory.state() is RunState.QUEUED:
            return
        again = state in (RunState.RUNNING, RunState.REQUEUED)
        if again and self._directory.is_cancelled(self._allocation.job_id):
            return  # a person's word
        self._directory.write_status(
            state,
            attempt=end.number,
            job_id=self._allocation.job_id,
            exit_code=end.exit_code,
            reason=f"{end.facts['reason']}: {end.why}" if state is RunState.STOPPED else end.why,
            iteration=end.facts["iteration"],
            checkpoint=self.last_good(),
        )
