"""slurm/counters.sh on every node: what devices and kernel counted before an attempt, and what has been added since."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.job.first_failure import MEMORY_FOUND
from megatron_qwen.job.ranks import HEALTH_STEP
from megatron_qwen.job.step_output import output_of

SCRIPT = "slurm/counters.sh"
# A failed attempt waits for this; the script's own limits add up to 40 s where a driver hangs. Chosen by hand.
_TIMEOUT_S = 60.0
_LINE = re.compile(r"^(?:\d+: )?counters (\S+):(.*)$", re.MULTILINE)
_COUNTED = re.compile(r"(\S+)=(\d+)")
_XID = re.compile(r"xid_(\d+)")
# Xid errors that NVIDIA's list (docs.nvidia.com/deploy/xid-errors) gives hardware as the cause of: double-bit ECC,
# failed retirement or remapping, NVLink, fallen off the bus, high rate of single bits, ECC contained and uncontained,
# GSP. Others, such as 13, 31, 43 and 45, are mostly what a program did.
_XID_OF_HARDWARE = frozenset({48, 62, 64, 74, 79, 92, 94, 95, 119, 120, 140})

Counters = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class NodeCounters:
    """Reads the counters of the nodes of a job.

    Args:
        nodes: of the job.
        script: slurm/counters.sh of the run's code.
        environment: of srun.
        step_nodes: arguments of srun that name the nodes, where the job has others.
    """

    nodes: Sequence[str]
    script: Path
    environment: Mapping[str, str]
    step_nodes: Sequence[str] = ()

    def read(self) -> Counters:
        """The counters by node; nodes that do not answer are missing."""
        if not self.script.is_file():
            return {}
        count = len(self.nodes)
        command = [
            "srun",
            f"--nodes={count}",
            f"--ntasks={count}",
            "--ntasks-per-node=1",
            "--export=ALL",
            f"--job-name={HEALTH_STEP}",
            *self.step_nodes,
            "--overlap",  # a hang is looked at while its ranks are there
            "--immediate=20",
            "bash",
            str(self.script),
        ]
        try:
            done = output_of(command, environment=self.environment, timeout_s=_TIMEOUT_S)
        except OSError:
            return {}
        return parse(done.stdout)


def noted(log: Path) -> Counters:
    """The counters in the output of a health check; empty where there is none."""
    try:
        return parse(log.read_text(errors="replace"))
    except OSError:
        return {}


def parse(text: str) -> Counters:
    """``counters n2: oom_kill=1 xid_79=2`` by node."""
    return {node: {name: int(value) for name, value in _COUNTED.findall(rest)} for node, rest in _LINE.findall(text)}


def added(before: Counters, after: Counters) -> dict[str, tuple[str, ...]]:
    """What the counters of each node have gone up by, a line each; what could not be read before is left out."""
    found: dict[str, tuple[str, ...]] = {}
    for node in before.keys() & after.keys():
        lines = []
        for name, value in sorted(after[node].items()):
            more = value - before[node].get(name, 0 if _begins_at_none(name, before[node]) else value)
            if more > 0 and (line := _line(name, more)) is not None:
                lines.append(line)
        if lines:
            found[node] = tuple(lines)
    return found


def _begins_at_none(name: str, before: Mapping[str, int]) -> bool:
    """Whether a counter that is missing stood at 0: Xid errors are counted where the kernel log has some."""
    return _XID.fullmatch(name) is not None and "kernel_oom" in before


def _line(name: str, more: int) -> str | None:
    times = "" if more == 1 else f" {more} times"
    if name == "oom_kill":
        return f"{MEMORY_FOUND} in the job's cgroup{times}"
    if name == "kernel_oom":
        return f"{MEMORY_FOUND} in the kernel log{times}"
    if (xid := _XID.fullmatch(name)) is not None:
        return f"Xid {xid[1]}{times}" if int(xid[1]) in _XID_OF_HARDWARE else None
    return f"{name} +{more}"
