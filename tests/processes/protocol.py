"""Which command lines are forked from a warm interpreter, and what a child becomes of such a command line."""

import atexit
import io
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.processes import kill_points

_ROOT = Path(__file__).resolve().parent.parent.parent
# Programs and ranks of the checkout. What else is started with sys.executable gets an interpreter of its own.
PACKAGES = ("megatron_qwen", "launch", "tools", "checkpoints_convert", "tests")
# Read when a process starts, by the interpreter, the C library or OpenMP: no fork for a child that wants another value.
_READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_")
# Without a driver nothing reads them.
_READ_WITH_A_DRIVER = ("CUDA_", "NVIDIA_") if Path("/proc/driver/nvidia").exists() else ()
# Names the interpreter that a program finds in sys.executable and writes into jobs: tests.processes.job_server.
PYTHON_VARIABLE = "MQ_TEST_PYTHON"
# A file descriptor: the server of a worker of pytest-xdist.
SERVER_VARIABLE = "MQ_TEST_SERVER"
_NOT_READ_AT_START = ("PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS")


@dataclass(frozen=True)
class ChildOptions:
    """What ``subprocess`` sets up between fork and exec.

    Args:
        environment: of the child.
        directory: to work in; None keeps the parent's.
        new_session: whether the child leads a session.
        process_group: to join, 0 for one of its own, -1 for the parent's.
    """

    environment: dict[str, str]
    directory: str | None
    new_session: bool
    process_group: int


def forkable(command: object, environment: Mapping[str, str], *, started_with: Mapping[str, str]) -> bool:
    """Whether a warm interpreter can become this command.

    Args:
        command: arguments as given to ``subprocess``.
        environment: the child's.
        started_with: the environment in which the warm interpreter started.
    """
    if not isinstance(command, list | tuple) or read_at_start(environment) != read_at_start(started_with):
        return False
    python, *words = map(os.fspath, command)
    is_program = words[:2] == ["-P", "-m"] and len(words) > 2 and words[2].split(".")[0] in PACKAGES
    return python == sys.executable and (is_program or is_worker(words))


def is_worker(words: Sequence[str]) -> bool:
    """Whether the words after the interpreter are those of a worker that pytest-xdist starts."""
    return list(words[:2]) == ["-u", "-c"]


def has_threads(words: Sequence[str]) -> bool:
    """Whether the words are those of a program that starts ranks from several threads."""
    return list(words[:3]) == ["-P", "-m", "launch.sweep"]


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must not differ."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START + _READ_WITH_A_DRIVER) and name not in _NOT_READ_AT_START
    }


def is_pristine() -> bool:
    """Whether this process can be forked into another program: one thread, and nothing patched by an earlier one."""
    return threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1 and "megatron" not in sys.modules  # noqa: PTH208


def become(
    command: Sequence[str], options: ChildOptions, streams: Sequence[int], *, prepare: Callable[[], None] = lambda: None
) -> NoReturn:
    """Runs ``python -P -m module arguments`` in this process, which was just forked, and ends it.

    Args:
        command: the whole command line.
        options: what to set up first.
        streams: file descriptors that become stdin, stdout and stderr.
        prepare: called when all that is done.
    """
    if options.new_session:
        os.setsid()
    elif options.process_group >= 0:
        os.setpgid(0, options.process_group)
    # Above 2 first: a stream may itself be one of the three.
    high = [os.dup(stream) if stream < 3 else stream for stream in streams]
    for number, stream in enumerate(high):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(options.environment)
    if options.directory is not None:
        os.chdir(options.directory)
    sys.executable = os.environ.get(PYTHON_VARIABLE, sys.executable)
    _reset_interpreter()
    prepare()
    kill_points.install()
    code = 0
    try:
        _run(command[1:])
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    _leave(code)


def _run(words: Sequence[str]) -> None:
    if is_worker(words):
        sys.argv = ["-c", *words[3:]]
        exec(words[2], sys.modules["__main__"].__dict__)
    else:
        module = words[2]
        sys.argv = [module, *words[3:]]
        for name in (module, f"{module}.__main__"):
            sys.modules.pop(name, None)  # imported in advance, which runpy would warn of
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _leave(code: int) -> NoReturn:
    """Ends as an interpreter does, without unwinding the frames of the process that was forked."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or a pipe that nobody reads
            code = code or 120
    os._exit(code)


def _reset_interpreter() -> None:
    """Streams, signal handlers, random numbers and the import path as a new interpreter has them."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    error = io.FileIO(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(error), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    first = [os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # A run's own copy of the code is imported anew; so is what tests import of each other, which pytest rewrites.
    imported_anew = {"tests"} if first[:1] == [str(_ROOT)] else set(PACKAGES)
    for name in [name for name in sys.modules if name.split(".")[0] in imported_anew]:
        del sys.modules[name]
    installed = [entry for entry in sys.path if Path(entry).is_relative_to(sys.base_prefix) or _is_in_venv(entry)]
    sys.path[:] = [*first, *installed]
    sys.path_importer_cache.clear()


def _is_in_venv(entry: str) -> bool:
    return Path(entry).is_relative_to(sys.prefix)
