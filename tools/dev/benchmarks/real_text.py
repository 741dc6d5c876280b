"""Real text of this machine: sources and documentation, as JSON lines."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

_ENDINGS = (".py", ".pyi", ".md", ".rst", ".h", ".hpp", ".cuh", ".c", ".txt")


def _files() -> Iterator[Path]:
    """Text files of this environment and of its Python, in a fixed order."""
    roots = [
        Path(sys.prefix) / "lib",
        Path(sys.base_prefix) / "lib",
        Path(sys.base_prefix) / "include",
        Path("/usr/include"),
    ]
    for root in roots:
        yield from (path for path in sorted(root.rglob("*")) if path.suffix in _ENDINGS and path.is_file())


def write_corpus(path: Path, *, megabytes: int) -> int:
    """Writes documents until there is so much text.

    Args:
        path: of the .jsonl.
        megabytes: of text that is wanted; less where the machine has less.

    Returns:
        UTF-8 bytes of text.
    """
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for file in _files():
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if not text.strip():
                continue
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= megabytes * 10**6:
                break
    return written
