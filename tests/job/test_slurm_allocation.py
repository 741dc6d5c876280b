"""The nodes of a Slurm job that are used, by what Slurm says of them. Real Slurm: tests/slurm."""

import pytest

from megatron_qwen import slurm
from megatron_qwen.errors import Problem
from megatron_qwen.job import slurm_allocation
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.slurm_allocation import SlurmAllocation

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


class Said:
    """What Slurm says, and what it was asked to do."""

    def __init__(self) -> None:
        self.job = {"JobState": "RUNNING", "Restarts": "0", "NodeList": "n[1-4]"}
        self.states = dict.fromkeys(("n1", "n2", "n3", "n4"), "ALLOCATED")
        self.left: list[list[str]] = []
        self.killed: list[tuple[str, ...]] = []
        self.refusals = 0

    def show_job(self, job_id):
        if self.refusals:
            self.refusals -= 1
            raise slurm.SlurmError(Problem("scontrol", None, "Unable to contact slurm controller"))
        return self.job

    def show_nodes(self, names=()):
        return {
            name: {"NodeName": name, "State": self.states[name], "NodeAddr": f"addr-{name}"}
            for name in (names or self.states)
        }

    def steps(self, job_id, names):
        return self.left.pop(0) if self.left else []

    def ask(self, *command):
        self.killed.append(command)
        return ""


@pytest.fixture
def said(monkeypatch) -> Said:
    found = Said()
    for name in ("show_job", "show_nodes", "steps", "ask"):
        monkeypatch.setattr(slurm, name, getattr(found, name))
    monkeypatch.setattr(slurm_allocation, "_STEPS_POLL_S", 0.001)
    return found


def allocation(spares: int = 1) -> SlurmAllocation:
    return SlurmAllocation(JobSettings(scheduler="slurm", signal_delay_s=60, spares=spares), JOB)


def test_spare_nodes_run_no_ranks(said):
    found = allocation()
    assert (found.nodes, found.spare_nodes, found.world_size) == (("n1", "n2", "n3"), ("n4",), 24)
    assert allocation(0).step_nodes(allocation(0).nodes) == (), "srun needs no list of all nodes"
    assert found.step_nodes(found.nodes) == ("--nodelist=n1,n2,n3",)


@pytest.mark.parametrize("state", ["DOWN*+CLOUD", "ALLOCATED*", "ALLOCATED+NOT_RESPONDING", "ALLOCATED+DRAIN", "FAIL"])
def test_a_node_that_is_lost_or_drained_is_replaced(said, state):
    found = allocation()
    said.states["n2"] = state
    assert found.regroup(()) is None
    assert (found.nodes, found.spare_nodes, found.world_size) == (("n1", "n3", "n4"), (), 24)
    said.states["n3"] = state
    assert "3 healthy nodes are needed" in str(found.regroup(()))
    assert found.nodes == ("n1", "n3", "n4"), "as before"


def test_nodes_to_avoid_and_nodes_that_slurm_has_taken_away(said):
    found = allocation(2)
    assert found.regroup(("n1",)) is None
    assert found.nodes == ("n2", "n3")
    said.job["NodeList"] = "n[1,3-4]"
    assert found.regroup(("n1",)) is None
    assert (found.nodes, found.spare_nodes) == (("n3", "n4"), ())


def test_a_spare_node_that_is_set_aside(said):
    found = allocation()
    found.set_aside(["n4"])
    assert found.spare_nodes == ()
    assert found.regroup(()) is None
    assert found.regroup(("n2",)) is not None


@pytest.mark.parametrize(
    "job",
    [
        {"JobState": "PENDING"},
        {"JobState": "COMPLETING"},
        {"JobState": "COMPLETING", "Reason": "NonZeroExitCode"},
        {"JobState": "FAILED"},
        {"JobState": "CANCELLED"},
        {"JobState": "RUNNING", "Restarts": "1"},
        {"JobState": "RUNNING", "PreemptTime": "2026-11-30T05:55:39"},
    ],
)
def test_a_job_that_slurm_ends(said, job):
    said.job |= job
    assert allocation().regroup(()) is not None


def test_ranks_that_are_left_are_killed(said, monkeypatch):
    said.left = [["7.0"], ["7.0"], []]
    assert allocation().regroup(()) is None
    assert said.killed == [("scancel", "--signal=KILL", "7.0")] * 2
    monkeypatch.setattr(slurm_allocation, "_STEPS_END_S", 0.0)
    said.left = [["7.3"]] * 9
    assert allocation().regroup(()) == "step 7.3 of the job has not ended"


def test_a_slurmctld_that_comes_back(said, monkeypatch):
    monkeypatch.setattr(slurm_allocation, "_REQUEUE_WAITS_S", (0.001, 0.001))
    said.refusals = 2
    assert allocation().regroup(()) is None
    said.refusals = 3
    assert "Unable to contact" in str(allocation().regroup(()))


def test_where_the_ranks_meet(said):
    """At the first node that is used, at another port in each attempt."""
    found = allocation()
    assert found.environment(3)["MASTER_ADDR"] == "addr-n1"
    assert found.regroup(("n1",)) is None
    told = found.environment(4)
    assert told["MASTER_ADDR"] == "addr-n2"
    assert told["MASTER_PORT"] != found.environment(5)["MASTER_PORT"]


def test_the_address_of_this_node_is_not_taken_for_anothers(said, monkeypatch):
    monkeypatch.setattr(slurm, "show_nodes", lambda names=(): {name: {"State": "IDLE"} for name in names})
    found = allocation()
    assert found.master_address() == "10.0.0.1"
    assert found.regroup(("n1",)) is None
    assert found.master_address() == "n2"


def test_steps_of_other_people_are_not_ours(monkeypatch):
    listed = "7.0 mq_ranks\n7.batch batch\n7.1 bash\n7.2 mq_health\n7.extern extern\n"
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: listed)
    assert slurm.steps("7", ("mq_ranks", "mq_health")) == ["7.0", "7.2"]


def test_a_step_that_ends_while_it_is_killed(said, monkeypatch):
    """scancel refuses then, and nothing is left."""

    def refuse(*command):
        said.killed.append(command)
        raise slurm.SlurmError(Problem("scancel", None, "Invalid job id specified"))

    monkeypatch.setattr(slurm, "ask", refuse)
    said.left = [["7.0"], ["7.0"], []]
    assert allocation().regroup([]) is None
    assert len(said.killed) == 2


@pytest.mark.parametrize(
    ("job", "ending"),
    [
        ({"JobState": "COMPLETING"}, Ending.CANCELLED),
        ({"JobState": "COMPLETING", "Reason": "NonZeroExitCode"}, Ending.NOTHING),
        ({"JobState": "FAILED", "Reason": "NonZeroExitCode"}, Ending.NOTHING),
    ],
)
def test_a_batch_script_that_is_killed_is_no_cancel(said, job, ending):
    said.job |= job
    assert allocation().ending() is ending
