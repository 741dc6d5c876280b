"""A rank prints the stacks of all its threads when it is told to, even from inside a collective."""

import faulthandler
import signal


def install() -> None:
    """SIGQUIT prints all stacks to stderr; a crash prints them too."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
