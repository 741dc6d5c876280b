"""The code of a run as it was at submission: tracked files, their uncommitted changes, new files git does not ignore.

A job runs this copy, so that a requeue three days later does not run what somebody is editing.
"""

import importlib.util
import json
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.attempts import now
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import publish
from megatron_qwen.secret_text import secret_in

ROOT = Path(__file__).resolve().parent.parent
NOTE, DIFF = "snapshot.json", "uncommitted.diff"
# Without git, what a job needs of an unpacked archive.
_PARTS = ("megatron_qwen", "launch", "tools", "checkpoints_convert", "slurm", "mq", "pyproject.toml", "constraints.txt")
# New files of these kinds are no code, and may hold secrets.
_PRIVATE = (".env", ".netrc", ".pem", ".key", ".p12", ".pfx", "id_rsa", "id_ed25519", "credentials", "secrets")
_LARGEST_NEW_FILE = 1 << 20  # larger than any source file: data or results, which a job does not need


@dataclass(frozen=True)
class Snapshot:
    """What was copied.

    Args:
        commit: of the checkout, None outside git.
        modified: whether it differs from that commit.
        left_out: new files that were not taken, with the reason.
    """

    commit: str | None
    modified: bool
    left_out: tuple[str, ...]


def freeze(target: Path, *, environ: dict[str, str], root: Path = ROOT) -> Snapshot:
    """Copies the checkout's code to ``target``, which must not exist.

    Args:
        target: the run's code directory.
        environ: the shell's variables; a change that holds the value of a secret one is refused.
        root: the checkout.

    Raises:
        ConfigError: a file that is tracked, or its change, holds a secret.
    """
    commit = _git(root, "rev-parse", "HEAD")
    tracked = _list(root, "ls-files", "-z") if commit else _walk(root)
    new = _list(root, "ls-files", "-z", "--others", "--exclude-standard") if commit else []
    taken, left_out = _sift(root, new, environ)
    diff = _git(root, "diff", "HEAD", "--binary") if commit else ""
    if diff is None:
        fix = "git diff HEAD gave no answer within a minute, so the state of the code cannot be recorded; try again."
        raise ConfigError(Problem("checkout", root, fix))
    _refuse_secrets(root, tracked, environ)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (*tracked, *taken):
        source = root / name
        if source.is_symlink() or not source.is_file():
            continue  # deleted in the working tree, or a link that may lead anywhere
        copy = temporary / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
        if source.suffix == ".py":
            _copy_compiled(source, copy)
    snapshot = Snapshot(commit, bool(diff or taken), tuple(left_out))
    note = {"commit": commit, "modified": snapshot.modified, "time": now(), "left_out": list(left_out), "new": taken}
    (temporary / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    removed = secret_in(diff or "", environ)  # a line that is taken out may have held one
    (temporary / DIFF).write_text(f"left out: it holds {removed}\n" if removed else diff or "")
    publish(temporary, target)
    return snapshot


def _copy_compiled(source: Path, copy: Path) -> None:
    """Copies what Python has compiled of a source file, so that not every rank of the job compiles it at its start.

    Python uses it only if it was made of a file of this size and time of change, so ``copy`` must have kept the time.
    What was made of another state of the source stays behind: that state may have held a secret.
    """
    compiled, target = (Path(importlib.util.cache_from_source(str(path))) for path in (source, copy))
    if target.parent.parent != copy.parent:  # PYTHONPYCACHEPREFIX is set
        return
    try:
        content = compiled.read_bytes()
    except OSError:
        return
    state = source.stat()
    made_of = struct.pack("<III", 0, int(state.st_mtime) & 0xFFFFFFFF, state.st_size & 0xFFFFFFFF)  # PEP 552
    if content[4:16] == made_of:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def _sift(root: Path, new: list[str], environ: dict[str, str]) -> tuple[list[str], list[str]]:
    """New files that are taken, and those left out with the reason."""
    taken, left_out = [], []
    for name in new:
        path = root / name
        if any(path.name == kind or path.name.endswith(kind) for kind in _PRIVATE):
            left_out.append(f"{name}: its name marks it as private")
        elif path.is_symlink():
            left_out.append(f"{name}: a link")
        elif not path.is_file() or path.stat().st_size > _LARGEST_NEW_FILE:
            left_out.append(f"{name}: larger than 1 MiB, or not a file")
        elif (what := secret_in(_text(path), environ)) is not None:
            left_out.append(f"{name}: holds {what}")
        else:
            taken.append(name)
    return taken, left_out


def _refuse_secrets(root: Path, tracked: list[str], environ: dict[str, str]) -> None:
    """A tracked file with a secret cannot be left out without changing the code."""
    found = [(name, secret_in(_text(root / name), environ)) for name in tracked if (root / name).is_file()]
    problems = [
        Problem(name, None, f"holds {what}, and would be copied into the run; remove it.")
        for name, what in found
        if what is not None and not what.startswith("what looks")
    ]
    if problems:
        raise ConfigError(problems)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _walk(root: Path) -> list[str]:
    files: list[Path] = []
    for part in _PARTS:
        path = root / part
        files += [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return [str(path.relative_to(root)) for path in files if "__pycache__" not in path.parts]


def _list(root: Path, *arguments: str) -> list[str]:
    return [name for name in (_git(root, *arguments) or "").split("\0") if name]


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git in the checkout; None where it is no checkout of its own or there is no git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip("\n") if done.returncode == 0 else None
