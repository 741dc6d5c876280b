"""A rank prints the stacks of all its threads on SIGQUIT, even while it waits inside a collective.

faulthandler writes from the signal handler itself, so the main thread does not have to return to the interpreter.
"""

import faulthandler
import signal


def install() -> None:
    """SIGQUIT prints all stacks to stderr; a crash prints them too."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
