"""Version and git commit of the running code."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SNAPSHOT = "snapshot.json"  # launch/snapshot.py writes it


@cache
def code_version() -> dict[str, str | bool | None]:
    """Version, commit (None outside a git checkout and a copy of one), and whether the code differs from it."""
    try:
        number = version("megatron_qwen")
    except PackageNotFoundError:
        number = "unknown"
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        modified = bool(_git(root, "status", "--porcelain", "--untracked-files=no")) if commit else None
        return {"version": number, "commit": commit, "modified": modified}
    return {"version": number, **_of_snapshot(root / _SNAPSHOT)}


def _of_snapshot(note: Path) -> dict[str, str | bool | None]:
    """The same of the copy that a job runs, from what its submission has noted; None of each elsewhere."""
    try:
        content = json.loads(note.read_text())
        commit = content["commit"]
        return {"commit": commit, "modified": bool(content["modified"]) if commit else None}
    except (OSError, ValueError, KeyError, TypeError):
        return {"commit": None, "modified": None}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
