"""Writers of a step's record: metrics.jsonl and TensorBoard, behind one protocol."""

from pathlib import Path
from typing import Any, Protocol

import orjson

from megatron_qwen.files import atomic_write


class MetricsWriter(Protocol):
    """Takes the record of a step."""

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; ``iteration`` is always among its keys."""

    def close(self) -> None:
        """Writes what is buffered."""


class JsonlWriter:
    """metrics.jsonl: one line per step.

    Lines past the iteration that a run resumes from are moved to metrics.superseded.jsonl when it opens.

    Args:
        path: the file.
        resumed_at: iteration that the run resumes from; 0 for a new run.
    """

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        lines = _lines(path)
        kept = [line for line in lines if _iteration(line) <= resumed_at]
        if moved := [line for line in lines if _iteration(line) > resumed_at]:
            with path.with_name("metrics.superseded.jsonl").open("ab") as file:
                file.write(b"".join(moved))
        atomic_write(path, b"".join(kept))
        self._file = path.open("ab")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line."""
        self._file.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _iteration(line: bytes) -> float:
    """Iteration of a line; infinite for one that was cut off in writing."""
    try:
        return int(orjson.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoardWriter:
    """TensorBoard event files.

    Args:
        directory: where they go.
        resumed_at: events after this iteration, of an earlier attempt, are hidden.
    """

    def __init__(self, directory: Path, *, resumed_at: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_at + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Writes every number of the record as a scalar."""
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration":
                self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()
