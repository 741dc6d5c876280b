"""Ranks watch a file in which their controller asks for the stacks of all threads, without the help of a scheduler.

On a shared file system the file must not be read by ten thousand ranks every second. So the ranks of a node take turns:
one of them looks at a time, and the others hear from it. Each rank listens on a socket of its node, and the kernel
tells whoever connects to it which process listens. The rank that has seen the request sends that process SIGQUIT
(``stack_dump``), which prints the stacks even of a process that holds the interpreter's lock. A rank that is stuck
itself only delays the next look by one turn.

What no file can reach: the only rank of a node, while it holds the interpreter's lock.
"""

import contextlib
import hashlib
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)
# Every rank prints the stacks of its threads on this signal; NCCL does not use it.
DUMP_SIGNAL = signal.SIGQUIT
_REQUEST = "stacks.request"
# A look is one open of a small file. Over all nodes of a job there are at most 100 a second, of which a file system for
# so many nodes serves many thousands. Both chosen by hand.
_SHORTEST_TURN_S, _LOOKS_PER_S = 2.0, 100.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def request_file(logs: Path) -> Path:
    """The file in which an attempt's ranks are asked for their stacks."""
    return logs / _REQUEST


def trace_file(logs: Path, rank: int) -> Path:
    """Where a rank then writes its last collectives."""
    return logs / f"collectives_rank_{rank}.json"


def ask(logs: Path) -> None:
    """Asks every rank of an attempt for its stacks.

    The file is extended in place. It exists since the start of the attempt, because NFS may hide a new name from its
    clients for a minute, while it shows the new length of an old file at the next open.
    """
    with request_file(logs).open("a") as file:
        file.write("stacks\n")


def turn_s(nodes: int) -> float:
    """Seconds between two looks of a node of a job with so many nodes."""
    return max(_SHORTEST_TURN_S, nodes / _LOOKS_PER_S)


class DumpWatch:
    """Watches the request file in a thread of a rank.

    Args:
        logs: of the attempt, on a file system that the controller shares.
        local_rank: rank on its node.
        local_size: ranks on its node.
        nodes: of the job.
        record: called in each rank when stacks are asked for; writes what else this rank knows.
        environ: names the job and the node.
    """

    def __init__(
        self,
        logs: Path,
        *,
        local_rank: int,
        local_size: int,
        nodes: int,
        record: Callable[[], None] = lambda: None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._file, self._record = request_file(logs), record
        self._local_rank, self._local_size, self._turn_s = local_rank, local_size, turn_s(nodes)
        place = (str(logs), environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_NODEID", ""))
        self._place = hashlib.sha256("\0".join(place).encode()).hexdigest()[:24]
        self._ended = threading.Event()
        self._listener = self._listen()
        self._seen = self._length()

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, name="mq dump watch", daemon=True).start()

    def stop(self) -> None:
        """Ends it after its next look, and frees the socket."""
        self._ended.set()
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                if self._poked(until=self._next_turn()):
                    self._seen = self._length()
                    self._record()
                elif self._length() > self._seen:
                    self._seen = self._length()
                    self._tell_all()
            except OSError as error:  # of a file system that may come back
                log.warning("the request for stacks could not be read: %s", error)

    def _tell_all(self) -> None:
        """Has every rank of this node print its stacks."""
        for peer in range(self._local_size):
            if peer != self._local_rank and (process := _listening(self._address(peer))) is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, DUMP_SIGNAL)
        os.kill(os.getpid(), DUMP_SIGNAL)
        self._record()

    def _next_turn(self) -> float:
        """When it is this rank's turn, in the clock of its node."""
        whole, own = self._turn_s * self._local_size, self._turn_s * self._local_rank
        return (int((time.time() - own) / whole) + 1) * whole + own

    def _poked(self, *, until: float) -> bool:
        """Waits; returns whether a rank of this node has told this one of the request."""
        wait_s = max(0.05, until - time.time())
        if self._listener is None:
            self._ended.wait(wait_s)
            return False
        self._listener.settimeout(wait_s)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return False
        with connection:
            return _peer(connection)[1] == os.getuid()

    def _length(self) -> int:
        try:
            with self._file.open("rb") as file:
                return len(file.read())
        except FileNotFoundError:
            return 0

    def _address(self, local_rank: int) -> str:
        return f"\0mq-{os.getuid()}-{self._place}-{local_rank}"

    def _listen(self) -> socket.socket | None:
        """A socket in Linux's abstract namespace, which leaves no file; None where there is no such thing."""
        if os.uname().sysname != "Linux":
            return None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self._address(self._local_rank))
            listener.listen()
        except OSError as error:
            log.warning("this rank cannot listen for requests for stacks of its node: %s", error)
            listener.close()
            return None
        return listener


def _listening(address: str) -> int | None:
    """The process of this user that listens there, which then hears of it; None if there is none.

    Nothing has to be answered: the kernel keeps the credentials of the process that called listen().
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(address)
        except OSError:
            return None
        process, user = _peer(client)
    return process if process > 0 and user == os.getuid() else None


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(found)
    return process, user
