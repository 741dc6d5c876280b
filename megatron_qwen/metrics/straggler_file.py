"""stragglers.jsonl: what every rank did in the course of a run, in a file whose size does not grow with the run.

A line is ``{"iteration", "attempt", "windows", "score", "compute_s", ...}``; a list has a number or null for each rank.
All lines stand for as many windows. Once there are too many lines, two neighbours become one.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_qwen.files import atomic_write
from megatron_qwen.json_lines import objects

log = logging.getLogger(__name__)
# A heat map of the report has room for some hundred columns. The numbers of all ranks in all lines are bounded too, so
# that the file has some 20 MB at most. Chosen by hand.
_LINES, _RANKS_TIMES_LINES, _FEWEST_LINES = 512, 1 << 19, 64
_SCORE = "score"


class StragglerFile:
    """Writes the file, on rank 0.

    Args:
        path: the file.
        attempt: number of this attempt.
        resumed_at: lines of earlier attempts after this iteration are dropped.
        nodes: the node of every rank.
        lines: at most so many lines are kept; None follows from the number of ranks.
    """

    def __init__(
        self, path: Path, *, attempt: int, resumed_at: int, nodes: Sequence[str], lines: int | None = None
    ) -> None:
        self.path, self.attempt = path, attempt
        self._most = lines or max(min(_LINES, _RANKS_TIMES_LINES // len(nodes)), _FEWEST_LINES)
        self._open: list[dict[str, Any]] = []
        earlier = list(objects(path.read_bytes().splitlines() if path.is_file() else ()))
        self._heads = [line for line in earlier if "nodes" in line]
        self._lines = [line for line in earlier if _iteration(line) <= resumed_at]
        if not self._heads or self._heads[-1]["nodes"] != list(nodes):
            self._heads.append({"attempt": attempt, "nodes": list(nodes)})
        self._span = max((int(line.get("windows", 1)) for line in self._lines), default=1)
        self._rewrite()

    def add(self, iteration: int, figures: Mapping[str, Sequence[float]]) -> None:
        """Adds a window.

        Args:
            iteration: its last step.
            figures: of every rank, by name; ``score`` is among them.
        """
        rounded = {name: [_rounded(value) for value in values] for name, values in figures.items()}
        self._open.append({"iteration": iteration, "attempt": self.attempt, "windows": 1, **rounded})
        if len(self._open) < self._span:
            return
        self._lines.append(_merged(self._open))
        self._open.clear()
        if len(self._lines) < self._most:
            with self.path.open("ab") as file:
                file.write(orjson.dumps(self._lines[-1], option=orjson.OPT_APPEND_NEWLINE))
            return
        self._span *= 2
        self._lines = _halved(self._lines)
        self._rewrite()

    def close(self) -> None:
        """Writes the windows that do not fill a line."""
        if self._open:
            self._lines.append(_merged(self._open))
            self._open.clear()
            self._rewrite()

    def _rewrite(self) -> None:
        content = b"".join(
            orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in (*self._heads, *self._lines)
        )
        atomic_write(self.path, content)


def _iteration(line: Mapping[str, Any]) -> float:
    """The last step of a line; infinite for a line that is none of a window."""
    value = line.get("iteration")
    return value if isinstance(value, int) and isinstance(line.get(_SCORE), list) else math.inf


def _halved(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours joined; those of different attempts are not, because their ranks may run elsewhere."""
    joined: list[list[dict[str, Any]]] = []
    for line in lines:
        last = joined[-1] if joined else []
        if len(last) == 1 and last[0]["attempt"] == line["attempt"] and _ranks(last[0]) == _ranks(line):
            last.append(line)
        else:
            joined.append([line])
    return [_merged(group) for group in joined]


def _ranks(line: Mapping[str, Any]) -> int:
    return len(line[_SCORE])


def _merged(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line for several: of the scores the lowest, so that a short slowness stays visible, of the rest the mean."""
    if len(lines) == 1:
        return lines[0]
    merged: dict[str, Any] = {**lines[-1], "windows": sum(line["windows"] for line in lines)}
    for name, values in merged.items():
        if isinstance(values, list):
            pick: Callable[[Sequence[float]], float] = min if name == _SCORE else _mean
            columns = zip(*(line[name] for line in lines), strict=True)
            known = ([value for value in column if value is not None] for column in columns)
            merged[name] = [_rounded(pick(column)) if column else None for column in known]
    return merged


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(value: float) -> float | None:
    """To three digits, which is what the measurement is good for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
