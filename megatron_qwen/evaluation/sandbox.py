"""Runs programs that a model has written where they can do no harm: bubblewrap, without network, files or time.

A program gets a file system of its own (the interpreter read-only, an empty directory to write to), process ids and a
network of its own, another user, no capabilities, limits of memory, processes and file sizes, and a wall clock. It
passes if it comes to its end: a program that exits before its tests have run does not.

Not guarded against: a program that is written to look as if it had come to its end, from inside the interpreter.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_AGAIN_S = 1.0
_STARTED, _PASSED = ".", "passed"
_MOST_SAID = 400  # bytes of why a program failed
_TMP_BYTES = 2**26  # of all files that a program writes
# User ids that nobody has: each program of root's gets its own, because the kernel counts processes by user.
_FIRST_USER, _USERS = 1_000_000_000, 1_000_000
_counted = itertools.count(os.getpid() * 64)
# Runs inside, before the program: limits cannot be raised again. What the program prints goes nowhere.
_BEGIN = """
import os, resource, sys
out, user, memory, processes, file, seconds = map(int, sys.argv[1:])
nowhere = os.open("/dev/null", os.O_WRONLY)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
for kind, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_NPROC, processes), (resource.RLIMIT_FSIZE, file),
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(kind, (most, most))
with open("/program.py", encoding="utf-8") as stream:
    text = stream.read()
os.write(out, b".")
try:
    exec(compile(text, "/program.py", "exec"), {"__name__": "__main__"})
except BaseException as error:
    os.write(out, f"{type(error).__name__}: {error}".encode(errors="replace")[:400])
    os._exit(1)
os.write(out, b"passed")
os._exit(0)
"""


class SandboxError(RuntimeError):
    """No sandbox can be made: nothing is known of the program."""


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Args:
        seconds: of wall clock, and of CPU.
        memory_bytes: of address space of each process.
        processes: and threads.
        file_bytes: of a file.
    """

    seconds: int = 30  # an own solution of MBPP (123) takes 8 s of a core of 2 GHz
    memory_bytes: int = 2**30
    processes: int = 16
    file_bytes: int = 2**24


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        passed: whether it came to its end.
        why: it did not; empty where it did.
    """

    passed: bool
    why: str = ""


@functools.cache
def unavailable() -> str | None:
    """Why programs cannot be run on this machine; None where they can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    try:
        found = _run("pass", SandboxLimits())
    except (OSError, SandboxError) as error:
        return f"no sandbox can be made here ({error}); containers and some kernels forbid it"
    return None if found.passed else f"a program that does nothing fails in the sandbox ({found.why})"


def run_programs(
    programs: Sequence[str], limits: SandboxLimits | None = None, *, workers: int | None = None
) -> list[Outcome]:
    """Runs Python programs, several at a time.

    Args:
        programs: source texts.
        limits: of each.
        workers: at a time; None is one for each core that this process may use.
    """
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda one: run_program(one, limits or SandboxLimits()), programs))


def run_program(program: str, limits: SandboxLimits) -> Outcome:
    """Runs a Python program.

    Raises:
        SandboxError: there is no sandbox here (``unavailable``), or none could be made this time, nor a second time.
    """
    if (reason := unavailable()) is not None:
        raise SandboxError(reason)
    try:
        return _run(program, limits)
    except (OSError, SandboxError):
        time.sleep(_AGAIN_S)  # a machine that is out of memory or processes for a moment
    try:
        return _run(program, limits)
    except OSError as error:
        raise SandboxError(f"no sandbox can be made now ({error})") from error


def _run(program: str, limits: SandboxLimits) -> Outcome:
    user = _FIRST_USER + next(_counted) % _USERS if _is_root() else 0
    numbers = (user, limits.memory_bytes, limits.processes, limits.file_bytes, limits.seconds)
    source = os.memfd_create("program")
    with os.fdopen(source, "wb") as file:
        file.write(program.encode(errors="replace"))
        file.flush()
        file.seek(0)
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as answer:
            try:
                walls = _walls("--perms", "0644", "--ro-bind-data", str(source), "/program.py")
                inside = [_interpreter(), "-I", "-c", _BEGIN, str(writing), *map(str, numbers)]
                process = subprocess.Popen(
                    [*walls, *inside],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(source, writing),
                )
            finally:
                os.close(writing)
            return _ended(process, answer.fileno(), limits)


def _ended(process: "subprocess.Popen[bytes]", answer: int, limits: SandboxLimits) -> Outcome:
    try:
        process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # everything inside dies with it
    # Of what the program prints nothing comes here: the begin sends it nowhere.
    _, printed = process.communicate()
    os.set_blocking(answer, False)
    said = ""
    with suppress(BlockingIOError):
        said = os.read(answer, _MOST_SAID).decode(errors="replace")
    if process.returncode == -signal.SIGKILL and said in ("", _STARTED):
        return Outcome(False, f"took longer than {limits.seconds} s")
    if not said.startswith(_STARTED):
        last = (printed.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise SandboxError(f"bubblewrap: {last[:_MOST_SAID]}")
    said, code = said.removeprefix(_STARTED), process.returncode
    if said == _PASSED and code == 0:
        return Outcome(True)
    return Outcome(False, said if said != _PASSED and said else f"ended before its end, with exit code {code}")


def _is_root() -> bool:
    """Whether this is the machine's root: that of a user namespace has few user ids to give away."""
    try:
        identity = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    return os.geteuid() == 0 and identity == ["0", "0", "4294967295"]


def _interpreter() -> str:
    """The one that a virtual environment was made of: programs get the standard library alone."""
    return os.path.realpath(sys.executable)


def _walls(*more: str) -> list[str]:
    """The command in front of what runs inside."""
    shown = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", sys.base_prefix]
    parents = dict.fromkeys(str(one) for path in shown for one in reversed(Path(path).parents[:-1]))
    # bubblewrap makes directories on the way to what it shows for itself alone.
    binds = [word for path in parents for word in ("--perms", "0755", "--dir", path)]
    binds += [word for path in dict.fromkeys(shown) for word in ("--ro-bind-try", path, path)]
    if not _is_root():
        own = ["--unshare-user", "--unshare-all", "--disable-userns"]
        own += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    else:
        # In a user namespace root's programs would still count as root's, whose processes the kernel does not limit.
        own = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        own += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [
        "bwrap",
        *own,
        *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
        *(
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--perms",
            "1777",
            "--size",
            str(_TMP_BYTES),
            "--tmpfs",
            "/tmp",
            "--chdir",
            "/tmp",
        ),
        *binds,
        *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "OMP_NUM_THREADS", "1"),
        *more,
        # bubblewrap's own root and /dev would take files without a limit.
        *("--remount-ro", "/dev", "--remount-ro", "/"),
    ]
