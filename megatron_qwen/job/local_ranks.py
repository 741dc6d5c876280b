"""Starts the ranks of a run on this machine and waits for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_qwen.errors import EXIT_FAILURE, EXIT_LOST_PEER
from megatron_qwen.job.ranks import TaskEnd

# Exit codes that a failure elsewhere causes: a rank that lost its peers says less about the cause than the peer that
# failed first. NCCL's watchdog ends a process that waits for a dead peer with SIGABRT.
_CONSEQUENCES = (EXIT_LOST_PEER, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT)
# For ranks that lost a peer to notice it and to write why they end (resilience/rank_end.py). Over gloo they notice at
# once. Chosen by hand.
_GRACE_S = 20.0
LOCAL_NODE = "this machine"
# SIGKILL comes from the out-of-memory killer or from a dying node: the peer is lost, but the run can be resumed.
_CODES_OF_SIGNALS: dict[int, int] = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGKILL: EXIT_LOST_PEER,
    signal.SIGABRT: EXIT_LOST_PEER,
}


class LocalRanks:
    """The processes of a run on one machine.

    Rank 0 writes to this terminal; the others to files, whose end is shown where one of them fails.

    Args:
        run_dir: run directory with its run.yaml.
        world_size: ranks to start.
        log_dir: where the other ranks' output goes.
        python: their interpreter.
        environment: of the ranks, without the variables that number them.
        quiet: rank 0 writes to a file as well.
        options: further words of a rank's command line, behind the run directory.
        program: what a rank is in place of a rank of training: a module, and all words of its command line.
        talks: rank 0 reads what is typed here. The ranks are then in this process's group, as a terminal gives what is
            typed to one group alone, and get its Ctrl-C twice: from the terminal and from this process.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        world_size: int,
        log_dir: Path,
        python: str = sys.executable,
        environment: Mapping[str, str] = os.environ,
        quiet: bool = False,
        options: Sequence[str] = (),
        program: Sequence[str] | None = None,
        talks: bool = False,
    ) -> None:
        self._talks = talks
        self.run_dir, self.world_size, self.log_dir = run_dir, world_size, log_dir
        self._python, self._environment, self._quiet = python, environment, quiet
        self._program = program or ("megatron_qwen.train", str(run_dir), *options)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: list[TaskEnd] = []
        self._deadline: float | None = None
        self._early: signal.Signals | None = None

    def run(self) -> int:
        """Starts the ranks, passes signals on, and waits.

        Returns:
            The exit code of the rank that failed first, else 0; 76 where a rank was killed.
        """
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._pass_on)
        try:
            self.start()
            if self._early is not None:
                self.send(self._early)
            while (code := self.poll()) is None:
                time.sleep(0.05)
            return code
        finally:
            self.kill()

    def start(self) -> None:
        """Starts the ranks."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        for rank in range(self.world_size):
            if rank == 0 and not self._quiet:
                self._processes.append(self._start(rank, port, None))
                continue
            with (self.log_dir / f"rank_{rank}.log").open("ab" if self._quiet else "wb") as output:
                self._processes.append(self._start(rank, port, output))

    def _start(self, rank: int, port: int, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
        size = str(self.world_size)
        environment = {
            **self._environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "MQ_LAUNCHER_PID": str(os.getpid()),
        }
        command = [self._python, "-P", "-m", *self._program]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=None if self._talks and rank == 0 else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # In their own process group ranks do not get the terminal's Ctrl-C: this process passes it on once.
            process_group=None if self._talks else 0,
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if len(self._processes) < self.world_size:
            self._early = signal.Signals(number)  # for all ranks, once there are all
        else:
            self.send(signal.Signals(number))

    def poll(self) -> int | None:
        """Exit code of all ranks together, or None while they run; _GRACE_S after a failure the rest are killed."""
        known = {end.rank for end in self._ended}
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None and rank not in known:
                self._ended.append(TaskEnd(rank, LOCAL_NODE, code))
        if self._deadline is None and any(end.code for end in self._ended):
            self._deadline = time.monotonic() + _GRACE_S
        late = self._deadline is not None and time.monotonic() > self._deadline
        if len(self._ended) < self.world_size and not late:
            return None
        self.kill()
        return self._verdict()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every rank that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def ends(self) -> list[TaskEnd]:
        """Ranks that did not end with 0, the first to end first."""
        return [end for end in self._ended if end.code]

    def failed_nodes(self) -> list[str]:
        """None: if this machine fails, this process fails with it."""
        return []

    def nodes_of_ranks(self) -> dict[int, str]:
        """This machine, for every rank."""
        return dict.fromkeys(range(self.world_size), LOCAL_NODE)

    def kill(self) -> None:
        """Kills every rank and waits for it."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _verdict(self) -> int:
        failed = self.ends()
        if not failed:
            return 0
        # Ranks that end within one look are in the order of their numbers, not of time. Those that this process killed
        # are not among them: one that SIGKILL ended is why the others lost a peer.
        causes = [end for end in failed if end.code not in _CONSEQUENCES]
        killed = [end for end in failed if end.code == -signal.SIGKILL]
        first = [*causes, *killed, *failed][0]
        log = self.log_dir / f"rank_{first.rank}.log"
        said_by_rank_0 = any(end.rank == 0 and end.code == first.code for end in failed)
        if first.rank and log.is_file() and not said_by_rank_0:
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print(
                f"rank {first.rank} exited with code {first.code}; the last lines of {log}:",
                *tail,
                sep="\n  ",
                file=sys.stderr,
            )
        if first.code < 0:
            print(f"rank {first.rank} was killed by {signal.Signals(-first.code).name}", file=sys.stderr)
            return _CODES_OF_SIGNALS.get(-first.code, EXIT_FAILURE)
        return first.code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
