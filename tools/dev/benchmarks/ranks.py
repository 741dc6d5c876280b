"""Starts the ranks of a benchmark on this machine and hears what rank 0 measured."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def measure(module: str, arguments: Sequence[str], *, ranks: int) -> Any:
    """Runs a module as so many ranks; rank 0's last line is JSON.

    Args:
        module: run as a program.
        arguments: its command line.
        ranks: processes; they share the machine's cores.

    Raises:
        RuntimeError: a rank failed; with what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-P", "-m", module, *arguments]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors[-3000:])
    return json.loads(outputs[0][0].splitlines()[-1])
