"""``mq bench restart``: seconds from a fault to the next step, inside the allocation and through Slurm's queue."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from tools.dev.benchmarks.rows import BenchmarkRow, against_peer

_ROOT = Path(__file__).resolve().parents[3]
_OURS = {
    "standby": "a killed rank, restarted inside the allocation by ranks that waited",
    "inside": "a killed rank, restarted inside the allocation",
    "spare": "a killed node, replaced by a spare one",
}
_PEERS = {
    "requeue": "a killed rank, requeued, Slurm's 120 s included",
    "requeue_hastened": "the same, started as soon as Slurm can",
}


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Has tiny runs on a Slurm of this machine (tests/slurm) lose a rank, ``rounds`` times; two minutes a round."""
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
        for ours, what in _OURS.items()
        for peer, name in _PEERS.items()
    ]
