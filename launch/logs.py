"""``mq launch logs``: what the ranks of a run printed: one of them, or all in the order of time; across attempts."""

import datetime
import heapq
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from launch import open_files
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.rundir import RunDirectory, RunState

_RANK = re.compile(r"rank_(\d+)\.log")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d)?")
_POLL_S = 0.5
_PIECE = 1 << 20  # bytes that are held of a log that is followed
_OVER = (RunState.DONE, RunState.STOPPED, RunState.CANCELLED)


def attempts_with_logs(directory: RunDirectory) -> list[int]:
    """Numbers of attempts that left logs, in order."""
    root = directory.logs(1).parent
    names = [path.name.removeprefix("attempt_") for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def chosen_attempts(directory: RunDirectory, attempt: int | None) -> list[int]:
    """The attempts to show.

    Raises:
        ConfigError: there is none, or not that one.
    """
    there = attempts_with_logs(directory)
    if attempt is not None and attempt not in there:
        known = ", ".join(map(str, there)) or "none"
        raise ConfigError(Problem("--attempt", attempt, f"has no logs here; logs exist of: {known}."))
    return there if attempt is None else [attempt]


def files(directory: RunDirectory, attempt: int, ranks: Sequence[int] | None) -> dict[int, Path]:
    """Logs of an attempt by rank; of all ranks where none is named."""
    found = {
        int(match[1]): path
        for path in directory.logs(attempt).glob("rank_*.log")
        if (match := _RANK.fullmatch(path.name))
    }
    return {rank: found[rank] for rank in sorted(found) if ranks is None or rank in ranks}


def merged(logs: dict[int, Path]) -> Iterator[str]:
    """Lines of several ranks in the order of their time stamps, each with its rank before it.

    A line without a time stamp, such as one of a traceback, stays behind the line it follows. Of each log one line is
    held at a time.
    """
    width = len(str(max(logs, default=0)))
    with ExitStack() as stack:
        open_files.allow(len(logs))
        streams = [
            _stamped(rank, stack.enter_context(path.open(errors="replace"))) for rank, path in sorted(logs.items())
        ]
        for _, rank, line in heapq.merge(*streams, key=lambda entry: entry[:2]):
            yield f"[{rank:>{width}}] {line}"


def _stamped(rank: int, lines: Iterable[str]) -> Iterator[tuple[float, int, str]]:
    """Each line with the latest time so far: a clock that was set back must not take lines out of their order."""
    moment = 0.0
    for line in lines:
        if match := _MOMENT.match(line):
            moment = max(moment, _seconds(match.group()))
        yield moment, rank, line.rstrip("\n")


def _seconds(moment: str) -> float:
    """Seconds since 1970; 0 of what looks like a time and is none.

    Logs of earlier versions have no offset: their times are taken as local here, as they are where they were written.
    """
    try:
        return datetime.datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def show(directory: RunDirectory, *, ranks: Sequence[int] | None, attempt: int | None, out: TextIO) -> None:
    """Prints the logs of one rank as they are, of several merged; a heading before each attempt.

    Raises:
        ConfigError: there is no such attempt, or none of the attempts has a log of one of the ranks.
    """
    chosen = {number: files(directory, number, ranks) for number in chosen_attempts(directory, attempt)}
    there = {rank for logs in chosen.values() for rank in logs}
    if absent := [rank for rank in ranks or () if rank not in there]:
        known = sorted({rank for number in chosen for rank in files(directory, number, None)})
        has = f"logs exist of ranks {known[0]} to {known[-1]}" if known else "no rank has written one yet"
        raise ConfigError([Problem("--rank", rank, f"has no log here; {has}.") for rank in absent])
    for number, logs in chosen.items():
        out.write(f"==> attempt {number}\n")
        if ranks is not None and len(ranks) == 1:
            for path in logs.values():
                with path.open(errors="replace") as file:
                    out.writelines(file)
        else:
            out.writelines(line + "\n" for line in merged(logs))


def follow(directory: RunDirectory, *, ranks: Sequence[int] | None, out: TextIO) -> None:
    """Prints what is there and then what is added, in every attempt that begins, until the run is over."""
    shown: dict[Path, int] = {}
    headed = 0
    while True:
        over = directory.state() in _OVER
        for number in attempts_with_logs(directory):
            for rank, path in files(directory, number, ranks).items():
                for text, end in _added(path, shown.get(path, 0)):
                    shown[path] = end
                    if number > headed:
                        headed = number
                        out.write(f"==> attempt {number}\n")
                    one = ranks is not None and len(ranks) == 1
                    out.writelines(line + "\n" if one else f"[{rank}] {line}\n" for line in text.splitlines())
        out.flush()
        if over:
            return
        time.sleep(_POLL_S)


def _added(path: Path, offset: int) -> Iterator[tuple[str, int]]:
    """Whole lines that were added behind ``offset``, piece by piece, each with where it ends.

    A line that is longer than a piece is cut.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(_PIECE):
            end = data.rfind(b"\n") + 1
            if not end and len(data) < _PIECE:
                return
            end = end or len(data)
            offset += end
            file.seek(offset)
            yield data[:end].decode(errors="replace"), offset
