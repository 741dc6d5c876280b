"""Seconds from a fault to the next step of a tiny run on the cluster of the tests, as JSON: for ``mq bench restart``.

python -P -m tests.slurm.measure_restart --rounds 2

Ranks start in interpreters of their own here, as on any cluster; the tests fork them from a warm one.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.demo import standard_library
from megatron_qwen.json_lines import objects
from tests.conftest import run
from tests.processes.protocol import PYTHON_VARIABLE
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import PAUSE, TP2, ClusterRun, Runs, hold_for_standby, kill

_FAULT_AT = 13  # three steps after a checkpoint
_LONGEST_S = 400.0
QUEUED, STANDBY = "resilience.restart_in_job=false", "resilience.standby_ranks=true"


class ColdCluster(SlurmCluster):
    """The cluster without the warm interpreter; patient: with the two minutes of Slurm's default before a requeue."""

    def __init__(self, root: Path, *, patient: bool) -> None:
        super().__init__(root)
        self._patient = patient

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster."""
        return {name: value for name, value in super().environment.items() if name != PYTHON_VARIABLE}

    def _write_configuration(self) -> None:
        super()._write_configuration()
        if self._patient:  # Slurm waits until no credential of the job is valid any more
            self.conf.write_text(self.conf.read_text().replace(",cred_expire=5", ""))


def seconds_to_next_step(found: ClusterRun, *, since: float, attempt: int, hasten: bool) -> float:
    """Waits for the first step of a later attempt."""
    metrics = found.path / "metrics.jsonl"
    while not any(int(one["attempt"]) > attempt for one in objects(metrics.read_bytes().splitlines())):
        if hasten:
            found.cluster.hasten()
        assert time.monotonic() - since < _LONGEST_S, found.story()
        time.sleep(0.05)
    return time.monotonic() - since


def measure(runs: Runs, name: str, *overrides: str, hasten: bool = False, spares: int = 0, node: bool = False) -> float:
    """Of one run; with ``node`` the node of the killed rank goes too."""
    held = hold_for_standby(runs, name, _FAULT_AT + 1) if STANDBY in overrides else ""
    found = runs.submit(name, *TP2, *overrides, options=("--spares", spares), patch=f"{PAUSE}\n{held}")
    found.wait_for_step(_FAULT_AT)
    process = found.rank_processes()[1]
    if STANDBY in overrides:
        found.wait_for_standby(1)
    if node:
        runs.cluster.kill_node("n2")
    since = time.monotonic()
    kill(process, signal.SIGKILL)
    seconds = seconds_to_next_step(found, since=since, attempt=1, hasten=hasten)
    swapped = found.attempts()[-1].nodes[1] != "n2"
    assert swapped is node, found.story()
    runs.cluster.clear()
    return seconds


@contextmanager
def cold(root: Path, *, patient: bool) -> Iterator[Runs]:
    """Runs on a cluster of their own."""
    cluster = ColdCluster(root / f"slurm_{patient}", patient=patient)
    try:
        cluster.start()
        yield Runs(cluster, root / "tokens", root / "bpe", root)
    finally:
        cluster.stop()


def main() -> None:
    """Prints seconds by what follows the fault: one figure a round, and one in all of Slurm's own delay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {
        "standby": [],
        "inside": [],
        "spare": [],
        "requeue_node": [],
        "requeue_hastened": [],
        "requeue": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = root / "text.jsonl"
        text.write_text("".join(json.dumps(document) + "\n" for document in standard_library(600_000)))
        run("tools.data", "tokenizer", "train", "--vocab-size", "320", "--output", root / "bpe", text, check=True)
        run("tools.data", "prepare", "--tokenizer", root / "bpe", "--output", root / "tokens", text, check=True)
        with cold(root, patient=False) as runs:
            for number in range(rounds):
                found["standby"].append(measure(runs, f"standby_{number}", STANDBY))
                found["inside"].append(measure(runs, f"inside_{number}"))
                found["requeue_hastened"].append(measure(runs, f"hastened_{number}", QUEUED, hasten=True))
                found["spare"].append(measure(runs, f"spare_{number}", spares=1, node=True))
                found["requeue_node"].append(measure(runs, f"node_{number}", QUEUED, hasten=True, node=True))
                print(json.dumps(found), file=sys.stderr, flush=True)
        with cold(root, patient=True) as runs:
            found["requeue"].append(measure(runs, "requeue", QUEUED))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
