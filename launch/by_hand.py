"""A run that somebody trains by hand (``mq train``), which no scheduler knows: told from its open attempt."""

import datetime
import os
import time
from typing import Any

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.json_lines import objects
from megatron_qwen.rundir import RunDirectory

# Rank 0 shows a sign of life every second, or as often as it makes a step. Longer than most steps, and short for a
# person who starts the run again after a machine has failed. Chosen by hand.
_SILENT_S = 120.0
_CLOCK_S = 5.0


def place(directory: RunDirectory, *, elsewhere: bool = True) -> str | None:
    """The process that trains the run by hand, None where nobody does.

    Args:
        directory: of the run.
        elsewhere: whether another machine counts, whose processes only their signs of life show.
    """
    entry = _open_attempt(directory)
    if entry is None or entry.get("job_id") is not None or entry.get("nodes"):
        return None
    process, host = entry.get("pid"), str(entry.get("host"))
    if host == os.uname().nodename:
        return f"process {process} here" if _is_its_process(process, str(entry["started"])) else None
    try:
        silent_s = time.time() - directory.heartbeat.stat().st_mtime
    except OSError:
        return None
    alive = elsewhere and silent_s < _SILENT_S
    return f"process {process} on {host}, which showed a sign of life {silent_s:.0f} s ago" if alive else None


def require_nobody(directory: RunDirectory, *, elsewhere: bool = True) -> None:
    """Raises ConfigError if somebody trains the run by hand: another start would take it from them.

    Args:
        directory: of the run.
        elsewhere: whether another machine counts, whose processes only their signs of life show.
    """
    where = place(directory, elsewhere=elsewhere)
    if where is not None:
        fix = f"is running already: it is being trained by hand, as {where}. To end it: SIGTERM; it saves first."
        raise ConfigError(Problem("run", directory.path, fix))


def _open_attempt(directory: RunDirectory) -> dict[str, Any] | None:
    """The line of the newest attempt, if no end of it is recorded."""
    lines = directory.attempts.read_bytes().splitlines() if directory.attempts.is_file() else []
    entries = [entry for entry in objects(lines) if isinstance(entry.get("attempt"), int)]
    newest = max((entry["attempt"] for entry in entries), default=0)
    of_newest = [entry for entry in entries if entry["attempt"] == newest]
    if not of_newest or any("ended" in entry for entry in of_newest):
        return None
    return next((entry for entry in of_newest if "started" in entry), None)


def _is_its_process(process: object, started: str) -> bool:
    """Whether it lives, and is not a younger one with its number."""
    import psutil  # for an open attempt only; every `mq launch` imports this module

    if not isinstance(process, int) or process == os.getpid():
        return False
    try:
        found = psutil.Process(process)
        begun = datetime.datetime.fromisoformat(started).timestamp()
        return found.status() != psutil.STATUS_ZOMBIE and found.create_time() < begun + _CLOCK_S
    except (psutil.Error, ValueError):
        return False
