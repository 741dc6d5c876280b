"""Faults of a run's file system at every moment of a run, each mended after a while: none needs a person."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_qwen import slurm
from tests.slurm.failing_disk import Disk, mounted
from tests.slurm.runs import SAVE_INTERVAL, TP2, ClusterRun, Runs, lost_iterations
from tests.tiers import cases

_SAYS = {"quota": "Disk quota exceeded", "read-only": "Read-only file system", "broken": "Input/output error"}


@contextmanager
def run_on_a_disk_of_its_own(runs: Runs, name: str) -> Iterator[tuple[Path, Disk]]:
    """The directory of a run, on a file system that fails when it is told to."""
    with mounted(runs.root / f"{name}.behind", runs.root / name) as disk:
        if disk is None:
            pytest.skip("no FUSE file system can be mounted here")
        yield runs.root / name, disk
        runs.cluster.clear()


def has_been_requeued(run: ClusterRun) -> bool:
    """Whether the job waits for its next start."""
    shown = slurm.fields(run.cluster.ask("scontrol", "show", "job", "-o", run.job))
    return shown["JobState"] == "PENDING" and int(shown["Restarts"]) > 0 and shown["StartTime"] != "Unknown"


@pytest.mark.parametrize(
    ("how", "when"),
    cases(
        [],  # test_storage.py has a disk that fills up in every run
        [(how, when) for how in ("quota", "read-only") for when in ("start", "step", "save")],
    ),
)
def test_a_file_system_that_fails_and_is_mended(runs, how, when):
    name = f"{how}_{when}"
    with run_on_a_disk_of_its_own(runs, name) as (path, disk):
        later = {"sbatch": {"begin": "now+3600"}} if when == "start" else {}
        run = runs.submit(name, *TP2, **later)
        assert run.path == path
        if when == "start":
            disk.fail(how)
        else:
            run.wait_for_step(SAVE_INTERVAL + 3)
            disk.fail(how, once_writing_to="" if when == "step" else "checkpoints/")
        wait(run, has_been_requeued)
        disk.mend()
        run.wait_for_end()
        *failed, last = run.attempts()
        assert last.reason == "finished"
        assert {one.reason for one in failed} == ({"storage"} if when != "start" else set())
        assert all(_SAYS[how] in one.detail for one in failed)
        assert lost_iterations(run.path) <= SAVE_INTERVAL
        assert run.hashes() == runs.undisturbed(2, *TP2)


def wait(run: ClusterRun, ready, *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready(run):
        if not run.attempts():  # it waits for the hour of its first start
            run.cluster.hasten()
        assert time.monotonic() < deadline, run.story()
        time.sleep(0.3)


@pytest.mark.parametrize("seconds", cases([], [60.0]))
def test_a_file_system_that_does_not_answer_for_a_minute(runs, seconds):
    with run_on_a_disk_of_its_own(runs, "stalled") as (_, disk):
        run = runs.submit("stalled", *TP2)
        run.wait_for_step(SAVE_INTERVAL + 3)
        disk.fail("stalled")
        time.sleep(seconds)
        disk.mend()
        run.wait_for_end()
        assert [one.reason for one in run.attempts()] == ["finished"], "nothing was ended for it"
        assert run.hashes() == runs.undisturbed(2, *TP2)
