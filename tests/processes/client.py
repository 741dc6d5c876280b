"""Has ``subprocess`` fork programs of the checkout from a warm interpreter instead of starting an interpreter anew.

The child is a process like any other: a child of the one that asked, with a number, streams, signals, a session and an
exit code of its own. What differs: its imports are done, and /proc shows the warm interpreter's command line.
"""

import ctypes
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.processes.nested import ChildRequest
from tests.processes.protocol import SERVER_VARIABLE

_ROOT = Path(__file__).resolve().parent.parent.parent
_PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """The warm interpreter, started at the first command that it can serve."""

    def __init__(self) -> None:
        self.enabled = True
        given = os.environ.pop(SERVER_VARIABLE, None)
        self._connection = None if given is None else socket.socket(fileno=int(given))
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)
        self._plain = subprocess.Popen._execute_child  # type: ignore[attr-defined]
        # Of the programs that tests start (tests.conftest.environment); they run on the CPU everywhere.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_ROOT)}

    def install(self) -> None:
        """Takes the place of ``Popen._execute_child``."""
        server = self

        def execute(self: Any, *arguments: Any) -> None:
            request = ChildRequest(arguments)
            if server.enabled and request.is_forkable(server.environment):
                self.pid, self._child_created = server.fork(request), True
                request.close_child_ends(self)
            else:
                server._plain(self, *arguments)

        subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]

    def fork(self, request: ChildRequest) -> int:
        """Number of a new child of this process that becomes what was asked for."""
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            options = request.options
            content = pickle.dumps((request.words(), options))
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._connection, [content], request.streams)
                answer = self._connection.recv(4)
            finally:
                self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert len(answer) == 4, "the warm interpreter has ended"
        return int.from_bytes(answer, "little")

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        command = [sys.executable, "-P", "-m", "tests.processes.server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, env=self.environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = ours

    def close(self) -> None:
        """Ends the warm interpreter."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.wait()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block every program gets an interpreter of its own."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True
