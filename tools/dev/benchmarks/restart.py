"""``mq bench restart``: seconds from a fault to the next step, inside the allocation and through Slurm's queue."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow, against_peer

_ROOT = Path(__file__).resolve().parents[3]
_RANK = "a killed rank"
_WAITED, _INSIDE = (
    f"{_RANK}, restarted inside the allocation by ranks that waited",
    f"{_RANK}, restarted inside the allocation",
)
_SPARE = "a killed node, replaced by a spare one"
_HASTENED = "started as soon as Slurm can"
# What is measured, and what it is compared with: the same fault, requeued.
_PAIRS = (
    ("standby", _WAITED, "inside", _INSIDE),
    ("standby", _WAITED, "requeue_hastened", f"{_RANK}, requeued, {_HASTENED}"),
    ("inside", _INSIDE, "requeue_hastened", f"{_RANK}, requeued, {_HASTENED}"),
    ("inside", _INSIDE, "requeue", f"{_RANK}, requeued, Slurm's 120 s included"),
    ("spare", _SPARE, "requeue_node", f"a killed node, requeued, {_HASTENED}"),
)


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Has tiny runs on a Slurm of this machine (tests/slurm) lose a rank, ``rounds`` times; three minutes a round."""
    command = [sys.executable, "-P", "-m", "tests.slurm.measure_restart", "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return [
        against_peer(
            what,
            [statistics.median(seconds[peer]) / mine for mine in seconds[ours]],
            ours=statistics.median(seconds[ours]),
            against=statistics.median(seconds[peer]),
            unit="s",
            peer=name,
            required=1.0,
            conditions=f"{rounds} rounds, two ranks on two nodes of one machine, cold interpreters",
        )
        for ours, what, peer, name in _PAIRS
    ]
