"""A job that is watched costs slurmctld nothing while it runs, and a hang is explained while slurmctld is down."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.runs import TP2, ClusterRun, Runs, kill
from tests.slurm.test_faults import check

_ASKING = ("squeue", "scontrol", "scancel", "sbatch", "sacct", "sinfo", "srun")


class Calls:
    """Programs of Slurm that note each of their calls; a job that has them first in its PATH calls them.

    Args:
        directory: where they and their notes are.
    """

    def __init__(self, directory: Path, path: str) -> None:
        self.directory, self.notes = directory, directory / "calls"
        directory.mkdir()
        for name in _ASKING:
            real = shutil.which(name, path=path)
            program = directory / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" >> {self.notes}\nexec {real} "$@"\n')
            program.chmod(0o755)

    @property
    def setup(self) -> list[str]:
        """Lines of a cluster file."""
        return [f"export PATH={self.directory}:$PATH"]

    def read(self) -> list[str]:
        """The calls so far, the name of the program and what it is asked."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [" ".join(line.split()[:3]) for line in lines]


def wait(ready: Callable[[], bool], run: ClusterRun, what: str) -> None:
    """Waits without a question to Slurm."""
    deadline = time.monotonic() + 90
    while not ready():
        assert time.monotonic() < deadline, f"no {what}\n{run.end_of_story()}"
        time.sleep(0.3)


def test_a_hang_while_slurmctld_is_down(runs: Runs, tmp_path: Path):
    calls = Calls(tmp_path / "programs", runs.cluster.environment["PATH"])
    patch = "time.sleep(0.3)"
    run = runs.submit("watched", *TP2, "resilience.hang_timeout_s=15", patch=patch, setup=calls.setup)
    run.wait_for_step(2)
    first = calls.read()
    assert first, "the job calls these programs"
    run.wait_for_step(35)
    assert calls.read() == first, "nothing is asked in steady running"

    runs.cluster.end_controller()
    kill(run.rank_processes()[1], signal.SIGSTOP)
    stacks = run.path / "logs/attempt_001/stacks.txt"
    wait(stacks.exists, run, "stacks")
    runs.cluster.start_controller()
    check(run, runs, "hang")
    hang = run.attempts()[0]
    assert hang.failed_nodes == ("n2",)
    assert "rank 1 on n2" in hang.detail
    text = stacks.read_text()
    assert "no stack from rank 1 on n2" in text
    assert "==== rank 0 on n1" in text
    # Which collective of a step it waits in depends on where rank 1 was stopped.
    assert "training/trainer.py" in text
    assert "rank 0 waits in gloo:" in text
    assert "; nothing is known of rank 1" in text
    print(*calls.read(), sep="\n")
    asked = calls.read()
    assert sum(call.startswith("srun ") for call in asked) == 5, (
        "the health check and the ranks, in each attempt, and the counters of the nodes after the hang"
    )
    assert all(asked.count(call) >= 2 * first.count(call) for call in first), "of both attempts"
