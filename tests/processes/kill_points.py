"""A forked program that is killed at a boundary between two states of its files.

A file appears, vanishes or becomes durable by a rename, an unlink or an fsync, so a kill before each of these calls
meets every state that a program can leave behind, where kills at random moments mostly meet the same few.
"""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tests.tiers import THOROUGH

# Number of the call before which the process and its children are killed, counted from 1.
VARIABLE = "MQ_TEST_KILL_BEFORE_CALL"
_CALLS = ("rename", "replace", "unlink", "remove", "fsync", "rmdir", "link", "mkdir")


def numbers() -> Iterator[int]:
    """Calls to be killed before: the first ones, then ever fewer; in the thorough tier each. Ends with the caller."""
    number = 1
    while True:
        yield number
        number = number + 1 if THOROUGH else number + 1 + number // 2


def install() -> None:
    """Counts the calls of this process, and of each that it forks; does nothing where no number is given."""
    if VARIABLE not in os.environ:
        return
    assert os.getpgrp() == os.getpid(), "the process must lead a group: the whole of it is killed"
    left = [int(os.environ[VARIABLE])]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
