"""Ranks of Slurm's jobs, forked from a warm interpreter: what ``JobPython`` starts and the stand-in script talks to.

Slurm starts, signals and waits for the stand-in, a small process that asks this server for the rank and ends as the
rank ends. A rank whose stand-in was killed is killed; its number stands in a file named after the stand-in's.
"""

import contextlib
import ctypes
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from tests.processes.protocol import ChildOptions, become
from tests.processes.server import import_libraries

_ROOT = Path(__file__).resolve().parent.parent.parent
_START_TIMEOUT_S = 120.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Started by Slurm once a rank and once a controller, so it imports as little as it can.
_STAND_IN = """#!{python} -IS
import os, pickle, signal, socket, sys

def forward(number, frame):
    os.kill(rank, number)

words, python = sys.argv[1:], {python!r}
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    if words[:3] != ["-P", "-m", "megatron_qwen.train"]:
        raise OSError
    connection.connect({address!r})
except OSError:
    os.execv(python, [python, *words])
request = pickle.dumps(([python, *words], dict(os.environ), os.getcwd(), os.getpid()))
socket.send_fds(connection, [request], [0, 1, 2])
rank = int(connection.recv(64))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, forward)
code = int(connection.recv(64) or -9)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class JobPython:
    """An interpreter for jobs of a cluster whose ranks are forked.

    Args:
        folder: for the socket, the stand-in and the numbers of ranks.
        environment: in which ranks start, as far as libraries read it when they are imported.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        # A socket's path is at most 108 bytes long.
        self._short = Path(tempfile.mkdtemp(prefix="mq_ranks_"))
        self._numbers = folder / "ranks"
        self._numbers.mkdir(parents=True)
        self.path = folder / "python"
        address = str(self._short / "socket")
        self.path.write_text(_STAND_IN.format(python=sys.executable, address=address))
        self.path.chmod(0o755)
        command = [sys.executable, "-P", "-m", "tests.processes.job_server", address, str(self._numbers)]
        own = {**os.environ, **environment, "PYTHONPATH": str(_ROOT)}
        self._server = subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not Path(address).exists():
            assert self._server.poll() is None, "the warm interpreter of jobs has ended"
            assert time.monotonic() < deadline, "the warm interpreter of jobs does not start"
            time.sleep(0.1)

    def rank_of(self, stand_in: int) -> int:
        """Number of the rank that a process of Slurm's stands for; its own where it is a rank itself."""
        try:
            return int((self._numbers / str(stand_in)).read_text())
        except (OSError, ValueError):
            return stand_in

    def close(self) -> None:
        """Ends the server and, with it, what it forked."""
        self._server.kill()
        self._server.wait()
        for path in self._short.iterdir():
            path.unlink()
        self._short.rmdir()


class _Server:
    def __init__(self, address: str, numbers: Path) -> None:
        self._numbers = numbers
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def run(self) -> NoReturn:
        """Serves until it is killed."""
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():  # a rank and its stand-in may end at the same moment
                    key.data()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not data:
            connection.close()
            return
        command, environment, directory, stand_in = pickle.loads(data)
        child = os.fork()
        if not child:
            _end_with_the_server()
            become(command, ChildOptions(environment, directory, new_session=False, process_group=-1), streams)
        for stream in streams:
            os.close(stream)
        (self._numbers / str(stand_in)).write_text(str(child))
        connection.send(str(child).encode())
        end = os.pidfd_open(child)
        # A word from the stand-in is its end: it says nothing after its request.
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._kill(child, connection))
        self._selector.register(end, selectors.EVENT_READ, lambda: self._report(child, end, connection))

    def _kill(self, child: int, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        os.kill(child, signal.SIGKILL)

    def _report(self, child: int, end: int, connection: socket.socket) -> None:
        self._selector.unregister(end)
        os.close(end)
        _, status = os.waitpid(child, 0)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):  # the stand-in was killed first
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()


def _end_with_the_server() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    import_libraries()
    _Server(sys.argv[1], Path(sys.argv[2])).run()
