"""Whatever happens to its job, a run ends by itself with the weights of an undisturbed one.

Real Slurm, real faults. Every case loses at most one save interval of work.
"""

import json
import signal
import time

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


def test_one_fault_after_another(runs):
    """slurmctld ended, `scontrol requeue`, preemption, a node set down, a killed rank, slurmctld killed: in one run."""
    run = runs.submit("many_faults", *TP2)
    run.wait_for_step(6)
    restart_controller(runs, signal.SIGTERM)

    run.wait_for_step(12)
    runs.cluster.ask("scontrol", "requeue", run.job)
    run.wait_for_attempt(2)

    run.wait_for_step(18)
    runs.cluster.ask("sbatch", "-p", "urgent", "-N", "4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    run.wait_for_attempt(3)
    assert lost_iterations(run.path) == 0, "it saved before it was requeued, and before it made room"

    run.wait_for_step(24)
    down = run.attempts()[-1].nodes[1]
    runs.cluster.ask("scontrol", "update", f"NodeName={down}", "State=DOWN", "Reason=test")
    run.wait_for_attempt(4)

    run.wait_for_step(32)
    node = run.attempts()[-1].nodes[1]
    kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait_for_attempt(5)

    run.wait_for_step(38)
    restart_controller(runs, signal.SIGKILL)
    check(run, runs, "requeued by hand", "preempted", "lost node", "lost peer")
    attempts = run.attempts()
    assert attempts[2].failed_nodes == (down,)
    assert attempts[3].failed_nodes == (node,)
    assert f"rank 1 on {node} was killed by SIGKILL" in attempts[3].detail


def restart_controller(runs: Runs, number: signal.Signals) -> None:
    """slurmctld ends and comes back; what runs is not disturbed."""
    runs.cluster.end_controller(number)
    time.sleep(1)
    runs.cluster.start_controller()


def test_time_limit(runs):
    """Of a minute; the signal comes between 20 and 50 seconds into it."""
    slow = 'if attempt == "1" and iteration > 10: time.sleep(1.5)'
    run = runs.submit("out_of_time", *TP2, patch=slow, time_limit="1:00")
    check(run, runs, "out of time")
    assert lost_iterations(run.path) == 0


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


def test_two_killed_slurmd(runs):
    """One under the controller, so that nobody is left to write down how the attempt ended, and one under a rank."""
    slow = f'if attempt == "1" and iteration > {FAULT_AT}: time.sleep(1.5)'
    first = runs.submit("slurmd_of_controller", *TP2, patch=slow, exclusive=True)
    second = runs.submit("slurmd_of_rank", *TP2, patch=slow, exclusive=True)
    for run in (first, second):
        run.wait_for_step(FAULT_AT)
    dead = {first: first.attempts()[0].nodes[0], second: second.attempts()[0].nodes[1]}
    for node in dead.values():
        runs.cluster.kill_node(node)
    for run, node in dead.items():
        run.wait_for_end(timeout_s=150)
        # Slurm 22.05 may refuse a step right after such a requeue ("Invalid generic resource"); that is tried again.
        attempts = [attempt for attempt in run.attempts() if "Unable to create step" not in attempt.detail]
        assert [attempt.reason for attempt in attempts] == ["lost node", "finished"], run.story()
        assert attempts[0].failed_nodes == (node,)
        assert not set(dead.values()) & set(attempts[1].nodes)
        assert run.hashes() == runs.undisturbed(2, *TP2)
        assert lost_iterations(run.path) <= SAVE_INTERVAL


def test_a_hang(runs):
    run = start(runs, "hang", resilience=("resilience.hang_timeout_s=6",))
    kill(run.rank_processes()[1], signal.SIGSTOP)
    check(run, runs, "hang")
    hang = run.attempts()[0]
    assert hang.failed_nodes == ("n2",)
    assert "rank 1 on n2" in hang.detail
    stacks = (run.path / "logs/attempt_001/stacks.txt").read_text()
    assert "no stack from rank 1 on n2" in stacks
    assert "==== rank 0 on n1" in stacks
    # Which collective of a step it waits in depends on where rank 1 was stopped.
    assert "training/trainer.py" in stacks


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


def test_a_slurmctld_that_dies_right_after_a_submit(runs):
    """It may have started the job, hold it, or have forgotten it: status says which, and the command it shows helps."""
    run = runs.submit("launch_failure", *TP2)
    restart_controller(runs, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while run.status()["state"] != "done":
        assert time.monotonic() < deadline, run.story()
        (row,) = json.loads(runs.mq("status", run.path, "--json"))
        if row["advice"]:
            assert row["state"] in ("held", "lost"), row
            runs.cluster.ask("scontrol", "update", "NodeName=n[1-4]", "State=RESUME", check=False)
            runs.mq("requeue", run.path)
        runs.cluster.hasten()
        time.sleep(1)
    assert run.hashes() == runs.undisturbed(2, *TP2)
