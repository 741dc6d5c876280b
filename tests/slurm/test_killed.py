"""The processes around the ranks of a job, killed one at a time: none of them ends a run."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.runs import SAVE_INTERVAL, TP2, ClusterRun, kill, lost_iterations
from tests.tiers import cases


def test_a_controller_that_is_killed(runs):
    run = runs.submit("no_controller", *TP2)
    run.wait_for_step(SAVE_INTERVAL + 3)
    kill(run.controller_process(), signal.SIGKILL)
    run.wait_for_end()
    first, second = run.attempts()
    assert first.job_id == second.job_id == run.job
    assert (first.exit_code, first.action) == (None, "requeue")
    assert second.reason == "finished"
    assert lost_iterations(run.path) <= SAVE_INTERVAL
    assert run.hashes() == runs.undisturbed(2, *TP2)
    said = "".join(path.read_text() for path in (run.path / "submission").glob("*.out"))
    assert "the controller ended with code 137 and decided nothing: requeued" in said


def batch_script(run: ClusterRun) -> list[int]:
    """The shell that Slurm started on the first node."""
    return _processes(lambda words: "bash" in words[0] and words[-1].endswith(f"job{int(run.job):05d}/slurm_script"))


def stepd_of_the_batch_script(run: ClusterRun) -> list[int]:
    """What watches that shell for Slurm."""
    return _processes(lambda words: words[0].startswith(f"slurmstepd: [{run.job}.batch]"))


def stepd_of_the_ranks(run: ClusterRun) -> list[int]:
    """What watches the ranks for Slurm, on each node; the first step of a job is its health check."""
    return _processes(lambda words: words[0].startswith(f"slurmstepd: [{run.job}.1]"))


def _processes(belongs: Callable[[list[str]], bool]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue
        if belongs(words):
            found.append(int(path.name))
    return sorted(found)


@pytest.mark.parametrize("which", cases([], [batch_script, stepd_of_the_batch_script, stepd_of_the_ranks]))
def test_a_process_of_slurm_that_is_killed(runs, which):
    run = runs.submit(which.__name__, *TP2)
    run.wait_for_step(SAVE_INTERVAL + 3)
    victims = which(run)
    assert victims
    kill(victims[-1], signal.SIGKILL)
    run.wait_for_end(timeout_s=240)
    assert run.attempts()[-1].reason == "finished"
    assert lost_iterations(run.path) <= SAVE_INTERVAL
    assert run.hashes() == runs.undisturbed(2, *TP2)
