"""How a rank reports its end to the job's controller, and how it learns whether it has a controller."""

import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_qwen.errors import SilentCorruptionError
from megatron_qwen.files import atomic_write_json

# Set by the controller for its ranks.
ATTEMPT_VARIABLE = "MQ_ATTEMPT"
# Fragments of CUDA's error messages.
_HARDWARE_SIGNS = (
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "GPU is lost",
    "hardware stack error",
    "GPU has fallen off",
)
_PATTERN = "rank_*.end.json"


@dataclass(frozen=True)
class RankEnd:
    """The end of a rank.

    Args:
        rank: which.
        exit_code: what it leaves with.
        message: one line for people.
        error: signature of an exception: its type and where it was raised. Empty where none was.
        time: Unix time, to find the rank that failed first.
        hardware: whether the message reports broken hardware, so that the node is to blame and not the program.
        suspects: ranks that silent corruption points to, empty where none can be named; None: no corruption was found.
    """

    rank: int
    exit_code: int
    message: str
    error: str
    time: float
    hardware: bool = False
    suspects: tuple[int, ...] | None = None

    def write(self, directory: Path) -> None:
        """Writes the record into the log directory of the attempt."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / _PATTERN.replace("*", str(self.rank))
        atomic_write_json(path, asdict(self), indent=None)


def rank_end(rank: int, *, exit_code: int, error: BaseException | None, message: str = "") -> RankEnd:
    """The record of an end, from the exception that caused it."""
    if error is None:
        return RankEnd(rank, exit_code, message, "", time.time())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind = type(error).__name__
    first_line = next(iter(str(error).strip().splitlines()), "")
    said = message or f"{kind}: {first_line}"
    suspects = error.suspects if isinstance(error, SilentCorruptionError) else None
    return RankEnd(rank, exit_code, said, f"{kind}{where}", time.time(), is_hardware_failure(str(error)), suspects)


def is_hardware_failure(text: str) -> bool:
    """Whether an error message reports broken hardware."""
    return any(sign in text for sign in _HARDWARE_SIGNS)


def read_rank_ends(directory: Path) -> list[RankEnd]:
    """The records that the ranks of an attempt wrote, earliest first."""
    ends = []
    for path in directory.glob(_PATTERN):
        try:
            content = json.loads(path.read_text())
            if content.get("suspects") is not None:
                content["suspects"] = tuple(content["suspects"])  # JSON has lists only
            ends.append(RankEnd(**content))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # the rank was killed while it wrote
    return sorted(ends, key=lambda end: end.time)


def attempt_of_controller(environ: Mapping[str, str] = os.environ) -> int | None:
    """Number of the attempt that the controller started this rank for; None without a controller."""
    text = environ.get(ATTEMPT_VARIABLE, "")
    return int(text) if text.isdecimal() else None
