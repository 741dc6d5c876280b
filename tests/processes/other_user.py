"""Runs a program of the project as another user: python -P -m tests.processes.other_user UID MODULE ARGUMENTS...

The user is changed after the imports, since an interpreter of a test machine may lie where no other user can read.
"""

import importlib
import os
import sys

import psutil  # noqa: F401 (imported by the programs later, when it could not be read any more)

from megatron_qwen.cli import run_program

NOBODY = 65534


def become(user: int) -> None:
    """Makes this process that user's, for good."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


if __name__ == "__main__":
    number, module = int(sys.argv[1]), importlib.import_module(sys.argv[2])
    sys.argv = [module.__name__, *sys.argv[3:]]
    become(number)
    run_program(module.main)
