"""slurm/healthcheck.sh on every node before the ranks start."""

import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_qwen.job.ranks import HEALTH_STEP
from megatron_qwen.job.step_output import output_of

# More than the longest check of slurm/healthcheck.sh, the loop over all nodes (240 s).
_TIMEOUT_S = 300.0
_FAILED = re.compile(r"^(?:\d+: )?healthcheck (\S+): FAIL (.*)$", re.MULTILINE)
_DONE = re.compile(r"^(?:\d+: )?healthcheck (\S+): (?:ok|FAIL)", re.MULTILINE)
_CLOCK = re.compile(r"^(?:\d+: )?clock (\S+): (\d+), (\d+) s allowed$", re.MULTILINE)
_STORAGE = re.compile(r".+ is not there|.+ cannot be written|\d+ GiB free on .+, \d+ wanted")
SCRIPT = "slurm/healthcheck.sh"
LOG = "health.log"


class HealthCheckError(Exception):
    """The check did not run on any node."""


def failures(
    nodes: Sequence[str],
    *,
    script: Path,
    arguments: Sequence[str],
    logs: Path,
    environment: Mapping[str, str],
    step_nodes: Sequence[str] = (),
) -> dict[str, str]:
    """Runs the check once on each node of the job.

    Args:
        nodes: to check.
        script: the check, on a file system that the nodes share.
        arguments: its arguments.
        logs: where its output is kept, as health.log.
        environment: of the check; ``--loop`` finds the rendezvous of the nodes there.
        step_nodes: arguments of srun that name the nodes, where the job has others.

    Returns:
        What is wrong, by node. A node that does not answer in time has failed.

    Raises:
        HealthCheckError: the check could not be started at all, so no node is to blame.
    """
    command = [
        "srun",
        f"--job-name={HEALTH_STEP}",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        *step_nodes,
        "bash",
        str(script),
        "--clock",
        "--counters",
        *arguments,
    ]
    own = {**environment, "MQ_LOOP_PYTHON": sys.executable}
    began = time.time()
    done = output_of(command, environment=own, timeout_s=_TIMEOUT_S)
    text, code = done.stdout + done.stderr, 1 if done.code is None else done.code
    (logs / LOG).write_text(text)
    found = dict(_FAILED.findall(text))
    heard = set(_DONE.findall(text))
    if code and not heard:
        said = next((line for line in text.splitlines() if line.strip()), f"srun exited with code {code}")
        raise HealthCheckError(f"the health check could not be started: {said}")
    off = wrong_clocks(text, began=began, ended=time.time(), here=environment.get("SLURMD_NODENAME"))
    for node, why in off.items():
        found[node] = f"{found[node]}; {why}" if node in found else why
    if code:
        found |= {node: "the health check did not finish" for node in nodes if node not in heard}
    return {node: why for node, why in found.items() if node in nodes}


def wrong_clocks(text: str, *, began: float, ended: float, here: str | None) -> dict[str, str]:
    """Nodes whose clock is off, and how much.

    They print their time at the same moment, which is not known: srun may wait before it can begin its step. So a time
    is compared with that of this node, or with the median where this one was not checked, and no time may lie before
    srun began or behind its end.

    Args:
        text: what the check printed on all nodes.
        began: when srun was called, seconds since the epoch.
        ended: when it ended.
        here: this node.
    """
    found = {}
    times = {node: (int(said), int(allowed)) for node, said, allowed in _CLOCK.findall(text)}
    if not times:
        return {}
    right = times[here][0] if here in times else statistics.median(said for said, _ in times.values())
    for node, (said, allowed) in times.items():
        off = max((said - right, said - max(said, began), said - min(said, ended)), key=abs)
        if abs(off) > allowed:
            found[node] = f"the clock is {off:.0f} s off"
    return found


def is_of_storage(why: str) -> bool:
    """Whether what is wrong with a node is the file system of the run, and nothing else."""
    return all(_STORAGE.fullmatch(part) for part in why.split("; "))
