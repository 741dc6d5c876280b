"""The decision survives the decider: a full disk ends no run."""

import datetime
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from megatron_qwen import slurm
from tests.slurm.runs import SAVE_INTERVAL, TP2, ClusterRun, lost_iterations

_TOO_LITTLE, _ENOUGH = "200m", "1300m"  # the health check wants 1 GiB


@pytest.fixture
def small_disk(runs) -> Iterator[Path]:
    """A file system of its own for the directory of a run."""
    path = runs.root / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_TOO_LITTLE},mode=700", "tmpfs", path]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield path
    runs.cluster.clear()
    subprocess.run(["umount", "--lazy", path], check=True)


def _write_for_ever(file: IO[bytes]) -> None:
    while True:
        file.write(bytes(1 << 16))


def fill(path: Path) -> Path:
    """Takes all room that is left."""
    filler = path / "someone_elses_file"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _write_for_ever(file)
    return filler


def test_a_disk_without_room_at_the_start_and_one_that_fills_up(runs, small_disk):
    run = runs.submit("small", *TP2)
    assert run.path == small_disk
    shown = wait_for_requeue(run)
    assert seconds_until(shown["StartTime"]) > 60, "it does not try again at once"
    subprocess.run(["mount", "-o", f"remount,size={_ENOUGH}", small_disk], check=True)
    run.wait_for_step(SAVE_INTERVAL + 5)
    filler = fill(small_disk)
    wait_for_requeue(run, comment="mq:")  # what could not be written
    filler.unlink()
    run.wait_for_end()
    first, second, third = run.attempts()
    assert (first.reason, first.action) == (second.reason, second.action) == ("storage", "requeue")
    assert f"0 GiB free on {small_disk}, 1 wanted" in first.detail
    assert f"No space left on device in {small_disk}" in second.detail
    assert third.reason == "finished"
    assert lost_iterations(run.path) <= SAVE_INTERVAL
    assert run.hashes() == runs.undisturbed(2, *TP2)


def wait_for_requeue(run: ClusterRun, *, comment: str = "") -> dict[str, str]:
    """The job when it is back in the queue, and may not start yet."""

    def shown() -> dict[str, str]:
        return slurm.fields(run.cluster.ask("scontrol", "show", "job", "-o", run.job))

    for _ in range(200):
        found = shown()
        known = found["StartTime"] != "Unknown" and found.get("Comment", "").startswith(comment)
        if found["JobState"] == "PENDING" and known and int(found["Restarts"]) == len(run.attempts()):
            return found
        time.sleep(0.3)
    raise AssertionError(run.story())


def seconds_until(moment: str) -> float:
    return (datetime.datetime.fromisoformat(moment) - datetime.datetime.now()).total_seconds()
