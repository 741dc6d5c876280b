"""The last records of metrics.jsonl before a resume."""

import os
from pathlib import Path
from typing import Any

from megatron_qwen.json_lines import objects

# Of one line; a record has about 700. Chosen by hand.
_MOST_BYTES = 4096


def recent(metrics: Path, *, last: int, count: int) -> list[dict[str, Any]]:
    """Records of at most ``count`` iterations up to ``last``, in order; only the end of the file is read."""
    if not metrics.is_file():
        return []
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - count * _MOST_BYTES))
        lines = file.read().splitlines()
    found = [record for record in objects(lines) if record.get("iteration", last + 1) <= last]
    return found[-count:]
