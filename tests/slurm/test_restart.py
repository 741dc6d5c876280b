"""After a fault the ranks start again inside the allocation, on a spare node where one has failed."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.runs import PAUSE, SAVE_INTERVAL, TP2, ClusterRun, Runs, hold_for_standby, kill, lost_iterations
from tests.tiers import cases


def srun_of(run: ClusterRun) -> int:
    """The process through which the controller sees the ranks."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if line[0] == "srun" and "megatron_qwen.train" in line and str(run.path) in line:
            return int(path.name)
    raise AssertionError("no srun")


def check(run: ClusterRun, runs: Runs) -> None:
    """The job was never requeued, and the weights are those of an undisturbed run."""
    assert [attempt.action for attempt in run.attempts()[:-1]] == ["restart"] * (len(run.attempts()) - 1)
    assert {(attempt.job_id, attempt.restarts) for attempt in run.attempts()} == {(run.job, 0)}
    assert "Restarts=0" in run.cluster.ask("scontrol", "show", "job", "-o", run.job)
    assert lost_iterations(run.path) <= SAVE_INTERVAL
    assert run.hashes() == runs.undisturbed(2, *TP2)


@pytest.mark.parametrize("harder", cases([False], [True]))
def test_a_killed_srun_and_then_a_node_that_dies(runs, harder):
    """Ranks outlive a killed srun: they end before the next ones start. The dead node is replaced by the spare one.

    The harder case: slurmctld is away at the first fault, and the dead node's ranks live on.
    """
    # Ranks that nobody ends must not finish the run: slurmctld is away for 12 s, and takes up to a minute to notice a
    # node without slurmd.
    early, late = SAVE_INTERVAL + 1, 2 * SAVE_INTERVAL + 4
    slow = f"2.0 if attempt == '1' and iteration > {early} else 5.0 if attempt == '2' and iteration > {late} else 0.12"
    pause = f"time.sleep({slow})" if harder else PAUSE
    run = runs.submit(f"spare_{harder}", *TP2, options=("--spares", 1), patch=pause)
    run.wait_for_step(SAVE_INTERVAL + 2)
    before = run.rank_processes()
    if harder:
        runs.cluster.end_controller()
    kill(srun_of(run), signal.SIGKILL)
    if harder:
        time.sleep(12)
        runs.cluster.start_controller()
    run.wait_for_attempt(2)
    assert not [process for process in before.values() if is_running(process)], "ranks of two attempts side by side"
    run.wait(lambda: len(run.rank_processes()) == 2, "second attempt", timeout_s=180)  # the spare node runs none
    run.wait_for_step(2 * SAVE_INTERVAL + 4)
    processes = run.rank_processes()
    runs.cluster.kill_node("n2")
    if not harder:
        kill(processes[1], signal.SIGKILL)
    run.wait_for_end(timeout_s=150)
    first, *between, last = run.attempts()
    assert (first.reason, first.error) == ("error", "srun -9")
    assert (last.reason, last.nodes, last.world_size) == ("finished", ("n1", "n3"), 2)
    # Slurm knows by now that the node is down, or before the next attempt, or the health check finds it out.
    reasons = ("lost node",) if harder else ("lost node", "unhealthy node", "lost peer")
    assert between[-1].reason in reasons, run.story()
    assert between[-1].failed_nodes == ("n2",), run.story()
    check(run, runs)


def test_ranks_that_wait_take_over(runs):
    """On the same nodes; on others they are ended, and others start. None is left behind."""
    name, at = "standby", SAVE_INTERVAL + 4
    patch = f"{PAUSE}\n{hold_for_standby(runs, name, at)}"
    spare = ("--spares", 1)
    run = runs.submit(name, *TP2, "resilience.standby_ranks=true", options=spare, patch=patch)
    run.wait_for_standby(1)
    assert len(run.rank_processes()) == 2
    kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait_for_attempt(2)
    run.wait_for_step(at + 2)
    runs.cluster.kill_node("n2")
    kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait_for_end(timeout_s=150)
    run.wait(lambda: not processes_of(run), "end of all processes", timeout_s=75)
    first, second, *_, last = run.attempts()
    assert (first.reason, first.nodes, second.nodes, last.nodes) == ("lost peer", *[("n1", "n2")] * 2, ("n1", "n3"))
    assert run.end_of_story().count("the ranks that waited begin") == 1
    assert "resumed" in (run.path / "logs/attempt_002/rank_0.log").read_text(), "the output moves with the ranks"
    check(run, runs)


def processes_of(run: ClusterRun) -> list[int]:
    """All that run ranks of a run or wait to."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (path / "cmdline").read_bytes().decode().split("\0")
            if "megatron_qwen.train" in line and str(run.path) in line:
                found.append(int(path.name))
    return found


def test_a_cancel_during_a_restart(runs):
    """The job ends, and is not started again."""
    patch = "time.sleep(0.12)\nif attempt == '1' and iteration == 12: os.kill(os.getpid(), 9)"
    run = runs.submit("cancelled_restart", *TP2, patch=patch)
    run.wait_for_attempt(2)
    assert "cancelled job" in runs.mq("cancel", run.path)
    run.wait_for_end("cancelled")
    run.wait(lambda: not run.cluster.ask("squeue", "-h"), "end of the job", timeout_s=60)
    first, second = run.attempts()
    assert first.reason == "lost peer"
    assert second.reason in ("cancelled", None)  # Slurm kills a controller that is too slow to note it


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
