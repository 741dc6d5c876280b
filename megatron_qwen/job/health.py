"""slurm/healthcheck.sh on every node before the ranks start."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# More than the longest check of slurm/healthcheck.sh, the loop over all nodes (240 s).
_TIMEOUT_S = 300.0
_FAILED = re.compile(r"^(?:\d+: )?healthcheck (\S+): FAIL (.*)$", re.MULTILINE)
_DONE = re.compile(r"^(?:\d+: )?healthcheck (\S+): (?:ok|FAIL)", re.MULTILINE)
SCRIPT = "slurm/healthcheck.sh"


class HealthCheckError(Exception):
    """The check did not run on any node."""


def failures(
    nodes: Sequence[str], *, script: Path, arguments: Sequence[str], logs: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """Runs the check once on each node of the job.

    Args:
        nodes: of the job.
        script: the check, on a file system that the nodes share.
        arguments: its arguments.
        logs: where its output is kept, as health.log.
        environment: of the check; ``--loop`` finds the rendezvous of the nodes there.

    Returns:
        What is wrong, by node. A node that does not answer in time has failed.

    Raises:
        HealthCheckError: the check could not be started at all, so no node is to blame.
    """
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "bash",
        str(script),
        "--clock",
        str(round(time.time())),
        *arguments,
    ]
    own = {**environment, "MQ_LOOP_PYTHON": sys.executable}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=own, check=False)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        text, code = _text(error.stdout) + _text(error.stderr), 1
    (logs / "health.log").write_text(text)
    found = dict(_FAILED.findall(text))
    heard = set(_DONE.findall(text))
    if code and not heard:
        said = next((line for line in text.splitlines() if line.strip()), f"srun exited with code {code}")
        raise HealthCheckError(f"the health check could not be started: {said}")
    if code:
        found |= {node: "the health check did not finish" for node in nodes if node not in heard}
    return {node: why for node, why in found.items() if node in nodes}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
