"""``mq bench startup``: how long a login node waits for an answer that needs no torch."""

import subprocess
import time
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

_MQ = Path(__file__).resolve().parents[3] / "mq"
_LIMIT_S = 0.5
_COMMANDS = (
    ("--help",),
    ("train", "--help"),
    ("launch", "submit", "--help"),
    ("config", "show", "qwen2_5_72b"),
    ("recipes",),
)


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Times each command as a whole process, ``rounds`` times in turn after one turn that does not count."""
    seconds: dict[tuple[str, ...], list[float]] = {command: [] for command in _COMMANDS}
    for number in range(rounds + 1):
        for command in _COMMANDS:
            started = time.perf_counter()
            subprocess.run([_MQ, *command], stdout=subprocess.DEVNULL, check=True)
            if number:
                seconds[command].append(time.perf_counter() - started)
    return [
        against_limit(f"mq {' '.join(command)}", values, limit=_LIMIT_S, unit="s", conditions=f"{rounds} rounds")
        for command, values in seconds.items()
    ]
