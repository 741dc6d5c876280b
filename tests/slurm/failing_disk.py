"""A file system that passes everything on to a directory, and fails as a test says: over quota, read-only, stalled.

python -m tests.slurm.failing_disk DIRECTORY MOUNT_POINT FAULT_FILE

It runs in a process of its own, through FUSE, so that programs meet the faults where they meet real ones: at system
calls. A kernel's own quota is not enforced against root, and a real file system with open files cannot be made
read-only by hand.
"""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate

import mfusepy

from megatron_qwen.files import atomic_write

NUMBERS = {"quota": errno.EDQUOT, "read-only": errno.EROFS, "broken": errno.EIO}
_STALLED = "stalled"
# What needs room, and what changes anything.
_TAKES_ROOM = ("write", "create", "mkdir", "symlink", "fallocate")
_CHANGES = (*_TAKES_ROOM, "rename", "unlink", "rmdir", "link", "truncate", "chmod", "utimens", "fsync")
_POLL_S = 0.2


def _may_fail[**Rest, Answer](
    operation: Callable[Concatenate["FailingDisk", str, Rest], Answer],
) -> Callable[Concatenate["FailingDisk", str, Rest], Answer]:
    @wraps(operation)
    def checked(self: "FailingDisk", path: str, *rest: Rest.args, **named: Rest.kwargs) -> Answer:
        self.fail(operation.__name__, path)
        return operation(self, path, *rest, **named)

    return checked


class FailingDisk(mfusepy.Operations):
    """The operations of a file system.

    Args:
        root: the directory behind it.
        fault: a file outside with ``{"fault": NAME, "in": TEXT}``; missing or empty is no fault. With a text the fault
            begins once something is written to a path that has the text in it, and then holds everywhere.
    """

    use_ns = True

    def __init__(self, root: Path, fault: Path) -> None:
        self._root, self._fault, self._begun = root, fault, False

    def fail(self, op: str, path: str) -> None:
        """Raises the fault of the moment if it concerns an operation; waits while the file system is stalled."""
        while (fault := self._now(op, path)) == _STALLED:
            time.sleep(_POLL_S)
        if fault and op in (_TAKES_ROOM if fault == "quota" else _CHANGES):
            raise mfusepy.FuseOSError(NUMBERS[fault])

    def _now(self, op: str, path: str) -> str:
        try:
            asked = json.loads(self._fault.read_text())
        except (OSError, ValueError):
            self._begun = False
            return ""
        self._begun = self._begun or (op == "write" and asked["in"] in path) or not asked["in"]
        return str(asked["fault"]) if self._begun else ""

    def _at(self, path: str) -> str:
        return f"{self._root}{path}"

    @_may_fail
    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {f"st_{name}time": getattr(found, f"st_{name}time_ns") for name in "amc"}
        return {name: getattr(found, name) for name in names} | times

    @_may_fail
    def readdir(self, path: str, fh: int) -> Iterator[str]:
        return iter([".", "..", *os.listdir(self._at(path))])  # noqa: PTH208

    @_may_fail
    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))  # noqa: PTH115

    @_may_fail
    def access(self, path: str, amode: int) -> int:
        return 0

    @_may_fail
    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags)

    @_may_fail
    def create(self, path: str, mode: int, fi: object = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    @_may_fail
    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    @_may_fail
    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        # Opened for appending the place does not matter, and the kernel has made it the end.
        return os.pwrite(fh, data, offset)

    @_may_fail
    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path), length)

    @_may_fail
    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    @_may_fail
    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    @_may_fail
    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))  # noqa: PTH104

    @_may_fail
    def link(self, target: str, source: str) -> None:
        os.link(self._at(source), self._at(target))

    @_may_fail
    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._at(target))  # noqa: PTH211

    @_may_fail
    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))  # noqa: PTH108

    @_may_fail
    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)  # noqa: PTH102

    @_may_fail
    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))  # noqa: PTH106

    @_may_fail
    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)  # noqa: PTH101

    @_may_fail
    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._at(path), uid, gid)

    @_may_fail
    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._at(path), ns=times)

    @_may_fail
    def statfs(self, path: str) -> Mapping[str, int]:
        found = os.statvfs(self._at(path))
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(found, name) for name in names}


class Disk:
    """What a test does to it.

    Args:
        fault: the file that the file system looks at.
    """

    def __init__(self, fault: Path) -> None:
        self._fault = fault

    def fail(self, how: str, *, once_writing_to: str = "") -> None:
        """Begins a fault, at once or when a path with this text in it is written to."""
        atomic_write(self._fault, json.dumps({"fault": how, "in": once_writing_to}))

    def mend(self) -> None:
        """Ends it."""
        self._fault.unlink(missing_ok=True)


@contextmanager
def mounted(backing: Path, at: Path) -> Iterator[Disk | None]:
    """The file system, mounted inside the block; None where this machine mounts none."""
    fault = backing.with_suffix(".fault")
    backing.mkdir()
    at.mkdir(exist_ok=True)
    own = subprocess.Popen([sys.executable, "-P", str(Path(__file__)), str(backing), str(at), str(fault)])
    try:
        deadline = time.monotonic() + 60
        while not at.is_mount() and own.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        yield Disk(fault) if at.is_mount() else None
    finally:
        fault.unlink(missing_ok=True)
        subprocess.run(["umount", "--lazy", at], capture_output=True, check=False)
        with suppress(subprocess.TimeoutExpired):
            own.wait(10)
        own.kill()


if __name__ == "__main__":
    directory, mount_point, fault_file = map(Path, sys.argv[1:])
    start = partial(mfusepy.FUSE, FailingDisk(directory, fault_file), str(mount_point), foreground=True)
    start(attr_timeout=0, entry_timeout=0, default_permissions=True)
