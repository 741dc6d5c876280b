"""What the files of a run say of it at a moment, for monitoring. Whatever cannot be read is left out."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.json_lines import objects
from megatron_qwen.metrics.performance_card import AttemptTime, goodput, read_attempts
from megatron_qwen.resilience.heartbeat import read_beat
from megatron_qwen.rundir import RunDirectory, RunState

_TAIL_BYTES = 8192


@dataclass(frozen=True)
class SlowRank:
    """A rank that its peers wait for.

    Args:
        rank: which.
        node: where.
        score: its speed as a share of its peers'.
    """

    rank: int
    node: str
    score: float


@dataclass(frozen=True)
class RunObservation:
    """A run at a moment; None where a file does not say.

    Args:
        time: of the look, seconds since 1970.
        state: of status.json.
        iteration: last one in metrics.jsonl.
        loss: of that step.
        tokens_per_second: of that step.
        stepped: when it was written, seconds since 1970.
        phase: what rank 0 says that the run is doing.
        alive: when it said so, seconds since 1970.
        attempts: made so far.
        ends: how many attempts have ended for each reason.
        excluded: nodes that the run avoids.
        stragglers: number of ranks that were slow in the last step.
        slow: the slowest of them.
        goodput: useful time of steps divided by the time since the run began.
        seconds: where that time went, by kind.
    """

    time: float
    state: RunState | None = None
    iteration: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    stepped: float | None = None
    phase: str | None = None
    alive: float | None = None
    attempts: int | None = None
    ends: Mapping[str, int] = field(default_factory=dict)
    excluded: int | None = None
    stragglers: int | None = None
    slow: tuple[SlowRank, ...] = ()
    goodput: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it is under way, so that the time since its last step says something."""
        return self.state is RunState.RUNNING


def observe(directory: RunDirectory, *, clock: Callable[[], float] = time.time) -> RunObservation:
    """Looks at a run."""
    moment, state, record = clock(), directory.state(), _newest(directory.metrics)
    beat, attempts = read_beat(directory.heartbeat), AttemptLog(directory.attempts).read()
    times = read_attempts(directory.performance)
    over = state in (RunState.DONE, RunState.STOPPED, RunState.CANCELLED)
    seconds = goodput(times)
    share = seconds.pop("share")
    return RunObservation(
        time=moment,
        state=state,
        iteration=_number(record, "iteration"),
        loss=_number(record, "lm_loss", "loss"),
        tokens_per_second=_number(record, "tokens_per_second") if state is RunState.RUNNING else None,
        stepped=_written(directory.metrics) if record else None,
        phase=beat.phase if beat is not None and state is RunState.RUNNING else None,
        alive=_written(directory.heartbeat),
        attempts=len(attempts),
        ends=Counter(one.reason for one in attempts if one.reason is not None),
        excluded=_excluded(attempts),
        stragglers=int(_number(record, "straggler_count") or 0) if record and state is RunState.RUNNING else None,
        slow=_slow(record) if state is RunState.RUNNING else (),
        goodput=(share if over else _until(moment, times, seconds["steps_s"])) if times else None,
        seconds=seconds if times else {},
    )


def _slow(record: Mapping[str, Any]) -> tuple[SlowRank, ...]:
    """The field ``stragglers`` of a step."""
    found = record.get("stragglers")
    try:
        return tuple(SlowRank(int(one["rank"]), str(one["node"]), float(one["score"])) for one in found or ())
    except (KeyError, TypeError, ValueError):
        return ()


def _until(moment: float, times: list[AttemptTime], useful_s: float) -> float:
    """The share of a time that has not ended: what has passed since the card was written is not useful yet."""
    whole = moment - min(one.started for one in times)
    return min(1.0, useful_s / whole) if whole > 0 else 0.0


def _newest(metrics: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; only the end of the file is read."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()[0 if size <= _TAIL_BYTES else 1 :]
    except OSError:
        return {}
    found = list(objects(lines[-2:]))
    return found[-1] if found else {}


def _number(record: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _excluded(attempts: Sequence[Attempt]) -> int | None:
    """Nodes that the run avoids, as the end of its last attempt has noted them; None before the first end."""
    ended = [attempt for attempt in attempts if attempt.ended is not None]
    return len(ended[-1].exclude) if ended else None
