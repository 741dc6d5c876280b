"""attempts.jsonl: every attempt at a run, how it started and how it ended.

One JSON object per line, only ever appended, by the controller or by rank 0. A line that a kill cut off is ignored when
the file is read, and the next append starts a new line after it.
"""

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qwen.files import LockHeldError, exclusive_lock
from megatron_qwen.json_lines import objects

log = logging.getLogger(__name__)
# A rank that hangs while it holds the lock must not block the next attempt for longer than this. Chosen by hand.
_LOCK_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run.

    Args:
        number: from 1.
        started: ISO time.
        nodes: names of its nodes; empty for a run outside a cluster.
        job_id: Slurm's, or None.
        restarts: how often Slurm had requeued the job before.
        world_size: ranks.
        ended: ISO time, or None if no end is recorded: the attempt still runs, or was killed.
        exit_code: None if no end is recorded.
        reason: why it ended; one of ``resilience.policy.Reason`` if a job controller recorded it.
        detail: one line about the cause.
        iteration: last finished iteration.
        gained: iterations it added.
        saved: newest committed iteration at its end.
        failed_nodes: nodes to blame for its end.
        error: signature of the exception that ended it, None if there was none.
        action: what the controller decided: none, restart (inside the allocation), requeue or stop.
        evidence: of its first failure, as ``resilience.evidence`` writes it; None where none was kept.
        fault: whose it was: program, node, storage, network or unknown; None where nothing failed, or none was kept.
        exclude: nodes that Slurm was asked to keep the job from after it.
    """

    number: int
    started: str
    nodes: tuple[str, ...] = ()
    job_id: str | None = None
    restarts: int | None = None
    world_size: int | None = None
    ended: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    detail: str = ""
    iteration: int | None = None
    gained: int | None = None
    saved: int | None = None
    failed_nodes: tuple[str, ...] = ()
    error: str | None = None
    action: str | None = None
    evidence: dict[str, Any] | None = None
    fault: str | None = None
    exclude: tuple[str, ...] = ()

    @property
    def wall_s(self) -> float | None:
        """Seconds from start to end; None if no end is recorded."""
        try:
            begun, ended = (datetime.datetime.fromisoformat(str(moment)) for moment in (self.started, self.ended))
            return (ended - begun).total_seconds()
        except ValueError:
            return None


@dataclass(frozen=True)
class AttemptLog:
    """Reads and appends to attempts.jsonl.

    Args:
        path: attempts.jsonl.
    """

    path: Path
    _lock: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """The lock file is next to attempts.jsonl."""
        object.__setattr__(self, "_lock", self.path.with_name(".attempts.lock"))

    def read(self) -> list[Attempt]:
        """All attempts in order; lines that were cut off are ignored."""
        begun: dict[int, dict[str, Any]] = {}
        ended: dict[int, dict[str, Any]] = {}
        for entry in _lines(self.path):
            number = entry.get("attempt")
            if isinstance(number, int) and "started" in entry:
                begun[number] = entry
            elif isinstance(number, int) and "ended" in entry:
                ended[number] = entry
        return [_attempt(number, begun[number], ended.get(number, {})) for number in sorted(begun)]

    def newest(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        return max(
            (entry["attempt"] for entry in _lines(self.path) if isinstance(entry.get("attempt"), int)), default=0
        )

    def run_id(self) -> str | None:
        """What tells the run from another that was in this directory before: hash of its first attempt's beginning.

        None before the first attempt.
        """
        first = next((entry for entry in _lines(self.path) if "started" in entry), None)
        return None if first is None else hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:16]

    def since_forgiven(self) -> list[Attempt]:
        """Attempts since a person last resumed the run (``mq launch requeue``): only these count as restarts."""
        through = [entry["forgiven_through"] for entry in _lines(self.path) if "forgiven_through" in entry]
        return [attempt for attempt in self.read() if attempt.number > max(through, default=0)]

    def forgive(self) -> None:
        """Makes the policy ignore all attempts so far, so that a stopped run can be resumed; nothing is deleted."""
        self._append({"forgiven_through": self.newest(), "time": now()})

    def asked_to_exclude(self) -> set[str]:
        """Nodes that the scheduler was ever asked to keep the run's jobs from."""
        lists = [entry["excluded"] for entry in _lines(self.path) if isinstance(entry.get("excluded"), list)]
        return {str(node) for nodes in lists for node in nodes}

    def note_excluded(self, nodes: Iterable[str]) -> None:
        """Records that the scheduler is asked to keep the run's jobs from nodes."""
        self._append({"excluded": sorted(nodes), "time": now()})

    def begin(self, **facts: Any) -> int:
        """Records a new attempt and returns its number, from 1. From now on no earlier attempt commits a checkpoint."""
        with self.exclusive():
            number = self.newest() + 1
            entry = {"attempt": number, "started": now(), **facts, "pid": os.getpid(), "host": os.uname().nodename}
            self._append(entry)
        return number

    def end(self, number: int, **facts: Any) -> None:
        """Records how an attempt ended."""
        self._append({"attempt": number, "ended": now(), **facts})

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            # A line that was cut off has no line end: terminate it first, or the new entry would be lost with it.
            torn = file.tell() and self.path.read_bytes()[-1:] != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the lock between the check for the newest attempt and the action that depends on it.

        After a timeout it continues without the lock: the file system may not support locks, or the holder may hang.
        """
        with ExitStack() as stack:
            with suppress(LockHeldError):
                stack.enter_context(exclusive_lock(self._lock, timeout_s=_LOCK_TIMEOUT_S, without_locks=log.debug))
            yield


def now() -> str:
    """The current time in UTC, in the ISO format of the run's files."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return objects(path.read_bytes().splitlines() if path.is_file() else ())


def _attempt(number: int, begin: dict[str, Any], end: dict[str, Any]) -> Attempt:
    def whole(value: Any) -> int | None:
        return value if isinstance(value, int) else None

    def text(value: Any) -> str | None:
        return None if value is None else str(value)

    return Attempt(
        number=number,
        started=str(begin["started"]),
        nodes=tuple(map(str, begin.get("nodes") or ())),
        job_id=text(begin.get("job_id")),
        restarts=whole(begin.get("restarts")),
        world_size=whole(begin.get("world_size")),
        ended=text(end.get("ended")),
        exit_code=whole(end.get("exit_code")),
        reason=text(end.get("reason")),
        detail=str(end.get("detail") or ""),
        iteration=whole(end.get("iteration")),
        gained=whole(end.get("iterations_gained")),
        saved=whole(end.get("saved_iteration")),
        failed_nodes=tuple(map(str, end.get("failed_nodes") or ())),
        error=text(end.get("error")),
        action=text(end.get("action")),
        evidence=found if isinstance(found := end.get("evidence"), dict) else None,
        fault=text(end.get("fault")),
        exclude=tuple(map(str, end.get("exclude") or ())),
    )
