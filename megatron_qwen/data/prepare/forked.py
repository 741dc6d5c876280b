"""Precautions before a process forks workers."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_left_to_the_parent() -> Iterator[None]:
    """Around a fork: the workers never collect garbage that this process has dropped but not yet collected.

    A finalizer that joins threads (those of a DALI pipeline, for one) waits forever in a forked process, which has
    none of its parent's threads. Objects frozen when a process is forked stay frozen in it.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
