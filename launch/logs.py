"""``mq launch logs``: what the ranks of a run printed: one of them, or all in the order of time; across attempts."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.rundir import RunDirectory, RunState

_RANK = re.compile(r"rank_(\d+)\.log")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_POLL_S = 0.5
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

    A line without a time stamp, such as one of a traceback, stays behind the line it follows.
    """
    entries: list[tuple[str, int, int, str]] = []
    for rank, path in logs.items():
        moment = ""
        for number, line in enumerate(path.read_text(errors="replace").splitlines()):
            if match := _MOMENT.match(line):
                moment = match.group()
            entries.append((moment, rank, number, line))
    width = len(str(max(logs, default=0)))
    for _, rank, _, line in sorted(entries, key=lambda entry: entry[:3]):
        yield f"[{rank:>{width}}] {line}"


def show(directory: RunDirectory, *, ranks: Sequence[int] | None, attempt: int | None, out: TextIO) -> None:
    """Prints the logs of one rank as they are, of several merged; a heading before each attempt."""
    for number in chosen_attempts(directory, attempt):
        logs = files(directory, number, ranks)
        out.write(f"==> attempt {number}\n")
        if ranks is not None and len(ranks) == 1:
            out.writelines(path.read_text(errors="replace") for path in logs.values())
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
                text, shown[path] = _added(path, shown.get(path, 0))
                if text and number > headed:
                    headed = number
                    out.write(f"==> attempt {number}\n")
                one = ranks is not None and len(ranks) == 1
                out.writelines(line + "\n" if one else f"[{rank}] {line}\n" for line in text.splitlines())
        out.flush()
        if over:
            return
        time.sleep(_POLL_S)


def _added(path: Path, offset: int) -> tuple[str, int]:
    """Whole lines that were added behind ``offset``, and where they end."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return data[:end].decode(errors="replace"), offset + end
