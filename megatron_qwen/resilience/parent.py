"""A rank must not outlive the launcher that started it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLE = "MQ_LAUNCHER_PID"


def die_with_launcher() -> None:
    """Has Linux kill this process when the local launcher that started it ends; does nothing on other systems.

    The launcher may have ended before prctl took effect, so the parent is compared afterwards.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or os.uname().sysname != "Linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
