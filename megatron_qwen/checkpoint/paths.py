"""Names inside a run's checkpoints/ directory."""

import re
from pathlib import Path

MANIFEST = "manifest.json"
RUN_YAML = "run.yaml"
STATE = "state.json"
GENERATORS = "generators.safetensors"
LATEST = "latest"
TOKENIZER = "tokenizer"
# Key in state.json: the checkpoint whose frozen weights adapters are for (``lora_base.py``).
LORA_BASE = "lora_base"

_COMMITTED = re.compile(r"iter_(\d{7,})")


def iteration_dir(root: Path, iteration: int) -> Path:
    """Directory of a committed checkpoint."""
    return root / f"iter_{iteration:07d}"


def temporary_dir(root: Path, iteration: int, attempt: int) -> Path:
    """Where an attempt writes a checkpoint before it is committed."""
    return root / f".iter_{iteration:07d}.attempt_{attempt}.tmp"


def committed(root: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints, newest first."""
    found = [
        (int(match.group(1)), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _COMMITTED.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)


def abandoned(root: Path) -> list[Path]:
    """Temporary directories that an attempt left behind."""
    return sorted(root.glob(".iter_*.tmp")) if root.is_dir() else []
