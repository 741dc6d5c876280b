"""Version and git commit of the running code."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def code_version() -> dict[str, str | bool | None]:
    """Version, commit (None outside a git checkout) and whether tracked files differ from that commit."""
    try:
        number = version("megatron_qwen")
    except PackageNotFoundError:
        number = "unknown"
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    modified = bool(_git(root, "status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"version": number, "commit": commit, "modified": modified}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
