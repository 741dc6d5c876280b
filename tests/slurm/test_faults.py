"""Whatever happens to its job, a run ends by itself with the weights of an undisturbed one.

Real Slurm, real faults. Every case loses at most one save interval of work.
"""

import signal
import time

import pytest

from tests.slurm.runs import SAVE_INTERVAL, TP2, ClusterRun, Runs, kill, lost_iterations

FAULT_AT = 25


def start(runs: Runs, name: str, *, resilience: tuple[str, ...] = ()) -> ClusterRun:
    run = runs.submit(name, *TP2, *resilience)
    run.wait_for_step(FAULT_AT)
    return run


def check(run: ClusterRun, runs: Runs, *reasons: str) -> None:
    """It ended as an undisturbed run does, for these reasons in between."""
    run.wait_for_end()
    assert [attempt.reason for attempt in run.attempts()] == [*reasons, "finished"], run.story()
    assert run.hashes() == runs.undisturbed(2, *TP2)
    assert lost_iterations(run.path) <= SAVE_INTERVAL
    numbers = [attempt.number for attempt in run.attempts()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_preemption_by_a_higher_partition(runs):
    run = start(runs, "preempted")
    runs.cluster.ask("sbatch", "-p", "urgent", "-N", "4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    check(run, runs, "preempted")
    assert lost_iterations(run.path) == 0, "it saved before it made room"


def test_scontrol_requeue(runs):
    run = start(runs, "requeued")
    runs.cluster.ask("scontrol", "requeue", run.job)
    check(run, runs, "requeued by hand")
    assert lost_iterations(run.path) == 0


def test_time_limit(runs):
    """The signal comes between 20 and 50 seconds into a minute; the run needs longer than that."""
    longer = ("training.train_iters=200", *TP2)
    run = runs.submit("out_of_time", *longer, options=("--time-limit", "1:00"), signal_delay_s=10)
    run.wait_for_end(timeout_s=300)
    reasons = [attempt.reason for attempt in run.attempts()]
    assert set(reasons[:-1]) == {"out of time"}, run.story()
    assert reasons[-1] == "finished"
    assert lost_iterations(run.path) == 0
    assert run.hashes() == runs.undisturbed(2, *longer)


def test_a_killed_rank(runs):
    run = start(runs, "killed_rank")
    kill(run.rank_processes()[1], signal.SIGKILL)
    check(run, runs, "lost peer")
    lost = run.attempts()[0]
    assert lost.failed_nodes == ("n2",)
    assert "rank 1 on n2 was ended by SIGKILL" in lost.detail


def test_a_node_that_fails_twice_is_avoided(runs):
    run = start(runs, "twice")
    kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait(lambda: len(run.rank_processes()) == 2 and len(run.attempts()) == 2, "second attempt", timeout_s=90)
    run.wait_for_step(FAULT_AT + 8)
    kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait_for_end()
    first, second, third = run.attempts()
    assert first.failed_nodes == second.failed_nodes == ("n2",)
    assert "n2" not in third.nodes
    assert run.hashes() == runs.undisturbed(2, *TP2)


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_killed_slurmd(runs, node):
    """n1 holds the controller: nobody is left to write down how the attempt ended."""
    slow = f'if attempt == "1" and iteration > {FAULT_AT}: time.sleep(1.5)'
    run = runs.submit_patched(f"slurmd_{node}", *TP2, patch=slow)
    run.wait_for_step(FAULT_AT)
    runs.cluster.kill_node(node)
    check(run, runs, "lost node")
    assert run.attempts()[0].failed_nodes == (node,)
    assert node not in run.attempts()[1].nodes


def test_a_node_set_down(runs):
    run = start(runs, "set_down")
    runs.cluster.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    check(run, runs, "lost node")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_slurmctld_ends_and_comes_back(runs, number):
    run = start(runs, f"slurmctld_{number.name}")
    runs.cluster.end_controller(number)
    time.sleep(2)
    runs.cluster.start_controller()
    check(run, runs)


def test_a_hang(runs):
    run = start(runs, "hang", resilience=("resilience.hang_timeout_s=8",))
    kill(run.rank_processes()[1], signal.SIGSTOP)
    check(run, runs, "hang")
    hang = run.attempts()[0]
    assert hang.failed_nodes == ("n2",)
    assert "rank 1 on n2" in hang.detail
    stacks = (run.path / "logs/attempt_001/stacks.txt").read_text()
    assert "no stack from rank 1 on n2" in stacks
    assert "==== rank 0 on n1" in stacks
    assert "in train_step" in stacks


def test_a_held_job_is_shown_with_the_command_that_releases_it(runs):
    run = runs.submit("held", *TP2)
    run.wait_for_step(2)
    runs.cluster.ask("scontrol", "requeuehold", run.job)
    run.wait(lambda: run.attempts()[-1].ended is not None, "an end", timeout_s=60)
    run.wait(lambda: "PENDING" in runs.cluster.ask("squeue", "-h", "-o", "%T"), "a held job", timeout_s=60)
    shown = runs.mq("status", run.path)
    assert "held" in shown
    command = next(line for line in shown.splitlines() if "scontrol release" in line)
    words = command.partition(": ")[2].partition("   (")[0].split()
    assert words == ["scontrol", "release", run.job]
    runs.cluster.ask(*words)
    check(run, runs, "requeued by hand")


def test_the_controller_node_of_a_batch_launch_failure(runs):
    """slurmctld that dies right after a submit leaves the job held or started; status says which, and it can go on."""
    run = runs.submit("launch_failure", *TP2)
    runs.cluster.end_controller(signal.SIGKILL)
    time.sleep(1)
    runs.cluster.start_controller()
    deadline = time.monotonic() + 90
    while run.status()["state"] == "queued" and time.monotonic() < deadline:
        shown = runs.mq("status", run.path)
        if "scontrol release" in shown:
            runs.mq("requeue", run.path)
            runs.cluster.ask("scontrol", "update", "NodeName=n[1-4]", "State=RESUME", check=False)
        runs.cluster.hasten()
        time.sleep(1)
    run.wait_for_end()
    assert run.hashes() == runs.undisturbed(2, *TP2)
