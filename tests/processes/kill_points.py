"""A forked program that kills itself at a boundary between two states of its files.

A file appears, vanishes or becomes durable by a rename, an unlink or an fsync, so a kill before each of these calls
meets every state that a program can leave behind, where kills at random moments mostly meet the same few.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

# Number of the call before which the process is killed, counted from 1.
VARIABLE = "MQ_TEST_KILL_BEFORE_CALL"
_CALLS = ("rename", "replace", "unlink", "remove", "fsync", "rmdir", "link", "mkdir")


def install() -> None:
    """Counts the calls of this process, and of each that it forks; does nothing where no number is given."""
    if VARIABLE not in os.environ:
        return
    left = [int(os.environ[VARIABLE])]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
