"""Memory that this process may still take: of the machine, and of the control groups that a job or container is in."""

from pathlib import Path

import psutil

# Version 1 has its memory controller here; without a limit it says a number next to 2^63.
_V1, _NO_LIMIT = "memory", 1 << 60


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping or being killed.

    A Slurm job's ``--mem`` and a container's limit are limits of a control group, which the machine's free memory says
    nothing of. Cache of files in a group counts as free, as the kernel takes it back first.

    Args:
        root: where /proc and /sys are.
    """
    left = [psutil.virtual_memory().available]
    for folder, names in _groups(root):
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            left.append(max(0, limit - used + _cache(folder)))
    return min(left)


def _groups(root: Path) -> list[tuple[Path, tuple[str, str]]]:
    """The folders of this process's groups and of those above them, with the names of limit and usage."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif _V1 in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be that of the host, which is not mounted: the group is then the top.
        folder = top / path.lstrip("/")
        while folder != top:
            found.append((folder, names))
            folder = folder.parent
        found.append((top, names))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _cache(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
