"""The ranks of an attempt as their controller sees them, and how they are started under srun."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_qwen.files import publish

_SIGNALS_BY_TEXT = {
    "Killed": signal.SIGKILL,
    "Terminated": signal.SIGTERM,
    "Aborted": signal.SIGABRT,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "User defined signal 2": signal.SIGUSR2,
    "Quit": signal.SIGQUIT,
    "Interrupt": signal.SIGINT,
}
_FATAL = (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV)
_SIGNALS_BY_CODE = {128 + number: -number for number in map(int, _FATAL)}
_TASK_LINE = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): "
    r"(?:Exited with exit code (?P<code>\d+)|(?P<signal>[A-Z][\w ]*?)(?: \(core dumped\))?$)",
    re.MULTILINE,
)
_NODE_LINE = re.compile(r"srun: error: Node failure on (\S+)")
_KILL_TIMEOUT_S = 60.0
# Names of the steps of a job that are the controller's: a person may have others there, to look at a process.
RANKS_STEP, HEALTH_STEP = "mq_ranks", "mq_health"
SRUN_LOG = "srun.log"


@dataclass(frozen=True)
class TaskEnd:
    """How a rank's process ended.

    Args:
        rank: which.
        node: where.
        code: exit code, or the negative number of a signal.
    """

    rank: int
    node: str
    code: int


class Ranks(Protocol):
    """The processes of one attempt."""

    def poll(self) -> int | None:
        """Exit code of them all together once they have ended, else None."""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every rank."""

    def kill(self) -> None:
        """Ends every rank at once and waits for that."""

    def ends(self) -> list[TaskEnd]:
        """Ranks that did not end with 0, the first to end first."""

    def failed_nodes(self) -> list[str]:
        """Nodes whose failure was announced while the ranks ran."""

    def nodes_of_ranks(self) -> dict[int, str]:
        """Node of every rank."""


class SrunRanks:
    """Ranks under srun, one task a rank.

    Args:
        command: what each task runs.
        srun_arguments: further arguments of srun.
        logs: directory of this attempt's logs.
        environment: of srun and, through it, of the ranks.
        job_id: of the job whose step this is.
        placement: node of every rank.
        name: of the job step.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        srun_arguments: Sequence[str],
        logs: Path,
        environment: Mapping[str, str],
        job_id: str,
        placement: Mapping[int, str],
        name: str = RANKS_STEP,
    ) -> None:
        self._job_id, self._placement, self._name = job_id, dict(placement), name
        self._said = logs / SRUN_LOG
        own = (
            "srun",
            f"--job-name={name}",
            "--kill-on-bad-exit=1",
            "--wait=60",
            "--export=ALL",
            "--open-mode=append",
            f"--output={logs}/rank_%t.log",
            f"--error={logs}/rank_%t.log",
        )
        with self._said.open("ab") as said:
            self._srun = subprocess.Popen(
                [*own, *srun_arguments, *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def poll(self) -> int | None:
        """Exit code of srun: the highest of its tasks."""
        return self._srun.poll()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every rank, through Slurm: they are on many nodes."""
        step = f"{self._job_id}.{self._step_id()}"
        name = number.name.removeprefix("SIG")
        try:
            subprocess.run(["scancel", f"--signal={name}", step], capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"the signal could not be sent to the ranks: {error}", file=sys.stderr)

    def keep_log_in(self, logs: Path) -> None:
        """Makes the output of srun a file of another directory of the same file system."""
        publish(self._said, logs / SRUN_LOG)
        self._said = logs / SRUN_LOG

    def kill(self) -> None:
        """Kills the job step with SIGKILL, and srun itself if it does not exit within a minute."""
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while self._srun.poll() is None and time.monotonic() < deadline:
            self.send(signal.SIGKILL)
            try:
                self._srun.wait(5)
            except subprocess.TimeoutExpired:
                continue
        if self._srun.poll() is None:
            self._srun.kill()
            self._srun.wait()

    def _step_id(self) -> str:
        """The newest step of the job that has ranks."""
        command = ["squeue", "-h", "-s", "-j", self._job_id, "-o", "%i %j"]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return "0"
        own = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1:] == [self._name]]
        numbers = [int(step) for name in own if (step := name.rpartition(".")[2]).isdecimal()]
        return str(max(numbers, default=0))

    def ends(self) -> list[TaskEnd]:
        """Tasks that srun reported as failed, in the order of its reports."""
        return parse_task_ends(self._text())

    def failed_nodes(self) -> list[str]:
        """Nodes that srun reported as failed."""
        return _NODE_LINE.findall(self._text())

    def _text(self) -> str:
        return self._said.read_text(errors="replace") if self._said.is_file() else ""

    def nodes_of_ranks(self) -> dict[int, str]:
        """Node of every rank."""
        return self._placement


def parse_task_ends(text: str) -> list[TaskEnd]:
    """``srun: error: n2: tasks 2-3: Exited with exit code 76`` and its kind, rank by rank."""
    found: dict[int, TaskEnd] = {}
    for match in _TASK_LINE.finditer(text):
        if match["code"]:
            # A wrapper such as apptainer reports a signal of the rank as 128 and its number.
            code = _SIGNALS_BY_CODE.get(int(match["code"]), int(match["code"]))
        else:
            code = -int(_SIGNALS_BY_TEXT.get(match["signal"], signal.SIGKILL))
        for rank in ranks_of_line(match["tasks"]):
            found.setdefault(rank, TaskEnd(rank, match["node"], code))
    return list(found.values())


def ranks_of_line(text: str) -> list[int]:
    """``0-2,5`` as [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def placement(nodes: Sequence[str], tasks: Sequence[int]) -> dict[int, str]:
    """Node of every rank under Slurm's block distribution, which ``srun`` is told to use."""
    places = [node for node, count in zip(nodes, tasks, strict=True) for _ in range(count)]
    return dict(enumerate(places))


def environment_of_ranks(own: Mapping[str, str], *, address: str, port: int, attempt: int) -> dict[str, str]:
    """The controller's environment plus the rendezvous, without variables that would mislead the ranks."""
    mislead = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    mislead |= {"SLURM_EXPORT_ENV", "SBATCH_EXPORT", "SLURM_NO_KILL"}  # options of sbatch that srun would take too
    kept = {name: value for name, value in own.items() if name not in mislead and not name.startswith("SUBMITIT_")}
    if "SLURM_CPUS_PER_TASK" in own:
        kept["SRUN_CPUS_PER_TASK"] = own["SLURM_CPUS_PER_TASK"]  # srun no longer takes it from sbatch (Slurm 22.05)
    return {**kept, "MASTER_ADDR": address, "MASTER_PORT": str(port), "MQ_ATTEMPT": str(attempt)}
