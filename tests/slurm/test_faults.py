"""Whatever happens to its job, a run ends by itself with the weights of an undisturbed one.

Real Slurm, real faults. Every case loses at most one save interval of work.
"""

import json
import signal
import time

from megatron_qwen.slurm import fields
from tests.slurm.runs import PAUSE, SAVE_INTERVAL, TP2, ClusterRun, Runs, kill, lost_iterations
from tests.tiers import thorough

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
    # A second death of the same rank could be the program's, which is no matter of other runs.
    runs.cluster.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    run.wait_for_end()
    runs.cluster.ask("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # its slurmd may have done so
    runs.cluster.wait_until_idle()
    first, second, third = run.attempts()
    assert first.failed_nodes == second.failed_nodes == ("n2",)
    assert "n2" not in third.nodes
    assert run.hashes() == runs.undisturbed(2, *TP2)
    assert (second.fault, second.exclude) == ("node", ("n2",))
    assert first.evidence is not None
    assert (first.evidence["rank"], first.evidence["node"], first.evidence["signal"]) == (1, "n2", "SIGKILL")
    assert (first.reason, second.reason) == ("lost peer", "lost node")
    assert "excluded nodes: n2" in run.end_of_story()
    check_that_others_avoid(runs, "n2", because_of=run)


def check_that_others_avoid(runs: Runs, node: str, *, because_of: ClusterRun) -> None:
    """A run that is submitted later is kept from the node, until a person lifts that."""
    where = ("--run-root", runs.root)
    (known,) = json.loads(runs.mq("nodes", *where, "--json"))
    assert (known["node"], known["by"], known["runs"]) == (node, "controller", [str(because_of.path)])
    assert [one["attempt"] for one in known["evidence"]] == [1, 2]
    other = runs.submit("other", *TP2, options=("--chain", 2), patch="")
    assert [excluded_by_slurm(runs, job) for job in other.jobs] == [node, node]
    (row,) = json.loads(runs.mq("status", other.path, "--json"))
    assert row["avoids"] == [node]
    runs.mq("cancel", other.path)
    file = runs.cluster_file()
    wide = runs.mq(
        "submit", *runs.words("training.global_batch_size=4"), "--cluster", file, "--nodes", 4, "--name", "wide"
    )
    assert f"does not avoid {node}, in quarantine: the job needs 4 nodes" in wide
    runs.mq("cancel", runs.root / "wide")
    runs.mq("nodes", *where, "--lift", node)
    assert json.loads(runs.mq("nodes", *where, "--json")) == []
    free = runs.submit("free", *TP2, patch="")
    assert excluded_by_slurm(runs, free.job) == ""


def excluded_by_slurm(runs: Runs, job: str) -> str:
    shown = fields(runs.cluster.ask("scontrol", "show", "job", "-o", job))
    return shown.get("ExcNodeList", "").replace("(null)", "")


@thorough("tests/job/test_verdict.py has the verdicts")
def test_a_program_that_kills_its_rank_costs_no_node(runs):
    """Rank 1 is killed wherever it runs, as the out-of-memory killer does, and saves in between."""
    deaths = 'os.environ["SLURM_PROCID"] == "1" and (attempt, iteration) in (("1", 14), ("2", 33))'
    run = runs.submit("program", *TP2, patch=f"{PAUSE}\nif {deaths}: os.kill(os.getpid(), 9)")
    run.wait_for_step(3)
    # The node goes on with what it runs, and is given to no other start: rank 1 is somewhere else then.
    runs.cluster.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    check(run, runs, "lost peer", "lost peer")
    first, second, _ = run.attempts()
    assert (first.fault, second.fault) == ("unknown", "program")
    assert first.failed_nodes == ("n2",)
    assert second.failed_nodes == second.nodes[1:] != ("n2",)
    assert (first.exclude, second.exclude) == ((), ())
    assert (
        f"the program is suspected: rank 1 was killed by SIGKILL 2 times on n2 and {second.nodes[1]}"
        in run.end_of_story()
    )
    assert excluded_by_slurm(runs, run.job) == ""
    assert json.loads(runs.mq("nodes", "--run-root", runs.root, "--json")) == []


@thorough("test_restart.py and test_sweep.py have a node that dies")
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


@thorough("test_watched.py has a hang in every run")
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


@thorough("tests/launch has the states and their advice")
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
