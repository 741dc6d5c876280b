"""Starts the ranks of a run on this machine and sees them to their end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_qwen.errors import EXIT_FAILURE, EXIT_LOST_PEER

# A rank that lost its peers says less about the cause than the peer that went first.
# NCCL's watchdog ends a process that waits for a dead peer by SIGABRT.
_CONSEQUENCES = (EXIT_LOST_PEER, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT)
_GRACE_S = 20.0
# SIGKILL is the out-of-memory killer or a dying node: the peer is lost, the run is not.
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
    """

    def __init__(self, run_dir: Path, *, world_size: int, log_dir: Path) -> None:
        self.run_dir, self.world_size, self.log_dir = run_dir, world_size, log_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._interrupts = 0

    def run(self) -> int:
        """Starts the ranks, passes signals on, and waits.

        Returns:
            The exit code of the rank that failed first, else 0; 76 where a rank was killed.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._pass_on)
        with_files: list[IO[bytes]] = []
        try:
            for rank in range(self.world_size):
                output = None if rank == 0 else (self.log_dir / f"rank_{rank}.log").open("wb")
                with_files += [output] if output else []
                self._processes.append(self._start(rank, port, output))
            return self._wait()
        finally:
            self._end_all()
            for file in with_files:
                file.close()

    def _start(self, rank: int, port: int, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
        size = str(self.world_size)
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "MQ_LAUNCHER_PID": str(os.getpid()),
        }
        command = [sys.executable, "-P", "-m", "megatron_qwen.train", str(self.run_dir)]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C reaches the ranks through us alone, once each.
            process_group=0,
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _wait(self) -> int:
        ended: list[tuple[int, int]] = []  # (rank, exit code) in the order they ended
        deadline: float | None = None
        while len(ended) < self.world_size:
            known = {rank for rank, _ in ended}
            for rank, process in enumerate(self._processes):
                code = process.poll()
                if code is not None and rank not in known:
                    ended.append((rank, code))
            if deadline is None and any(code for _, code in ended):
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return self._verdict(ended)

    def _verdict(self, ended: Sequence[tuple[int, int]]) -> int:
        failed = [(rank, code) for rank, code in ended if code]
        if not failed:
            return 0
        rank, code = next((item for item in failed if item[1] not in _CONSEQUENCES), failed[0])
        log = self.log_dir / f"rank_{rank}.log"
        if rank and log.is_file() and not any(other == 0 and code_ == code for other, code_ in failed):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print(f"rank {rank} ended with {code}; the end of {log}:", *tail, sep="\n  ", file=sys.stderr)
        if code < 0:
            print(f"rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
            return _CODES_OF_SIGNALS.get(-code, EXIT_FAILURE)
        return code

    def _end_all(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
