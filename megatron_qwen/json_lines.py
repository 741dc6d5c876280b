"""JSON lines, read leniently: a process that was killed may have left half a line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any


def objects(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines; other values and incomplete lines are skipped."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
