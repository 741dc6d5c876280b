"""Inside a forked program: the programs and ranks that it starts are forked from it in turn."""

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from tests.processes.protocol import ChildOptions, become, forkable, is_pristine

# Positions in the arguments of Popen._execute_child, the same in Python 3.12 and 3.13.
_NAMES = (
    "args", "executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell",
    "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals", "gid", "gids", "uid",
    "umask", "start_new_session", "process_group",
)  # fmt: skip


class ChildRequest:
    """What ``Popen`` was asked to start.

    Args:
        arguments: of ``Popen._execute_child``.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        named = dict(zip(_NAMES, arguments, strict=True))
        self.command = named["args"]
        self.environment: dict[str, str] = {
            os.fsdecode(name): os.fsdecode(value)
            for name, value in (os.environ if named["env"] is None else named["env"]).items()
        }
        self._named = named
        wanted = (named["p2cread"], named["c2pwrite"], named["errwrite"])
        self.streams = [number if stream == -1 else stream for number, stream in enumerate(wanted)]
        directory = None if named["cwd"] is None else os.fspath(named["cwd"])
        group = -1 if named["process_group"] is None else named["process_group"]
        self.options = ChildOptions(self.environment, directory, bool(named["start_new_session"]), group)

    def words(self) -> list[str]:
        """The command line."""
        return [os.fspath(word) for word in self.command]

    def is_forkable(self, started_with: Mapping[str, str]) -> bool:
        """Whether a warm interpreter that started with this environment can become what was asked for."""
        unusual = ("preexec_fn", "pass_fds", "shell", "executable")
        other_user = any(self._named[name] not in (None, -1) for name in ("uid", "gid", "gids", "umask"))
        if other_user or any(self._named[name] for name in unusual):
            return False
        return forkable(self.command, self.environment, started_with=started_with)

    def close_child_ends(self, popen: Any) -> None:
        """Closes the child's ends of pipes, as ``Popen`` itself does after a fork."""
        popen._close_pipe_fds(*(self._named[name] for name in _NAMES[10:16]))


def fork_in_place() -> None:
    """Has ``subprocess`` fork this process where what it is asked to start is a program of the checkout."""
    plain = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    started_with = dict(os.environ)

    def execute(self: Any, *arguments: Any) -> None:
        request = ChildRequest(arguments)
        if not request.is_forkable(started_with) or not is_pristine():
            plain(self, *arguments)
            return
        if child := os.fork():
            self.pid, self._child_created = child, True
            request.close_child_ends(self)
        else:
            become(request.words(), request.options, request.streams)

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]
