"""Nodes that a job avoids: never so many that it cannot be scheduled. What is reported is what Slurm really does."""

from collections.abc import Sequence

import pytest

from megatron_qwen import slurm
from megatron_qwen.errors import Problem
from megatron_qwen.job import slurm_allocation
from megatron_qwen.job.avoiding import Avoided, Places, avoidable
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.slurm_allocation import SlurmAllocation


def places(*states: str, partitions="train", gpus="gpu:4", unseen=0, needed_gpus=0) -> Places:
    nodes = {
        f"n{number}": {"NodeName": f"n{number}", "State": state, "Partitions": partitions, "Gres": gpus}
        for number, state in enumerate(states, 1)
    }
    return Places(nodes, {"train": unseen}, needed_gpus)


@pytest.mark.parametrize(
    ("wanted", "needed", "kept", "given_up"),
    [
        (["n1"], 2, ("n1",), ()),
        (["n1", "n2"], 2, ("n1", "n2"), ()),
        (["n3", "n1", "n2"], 2, ("n3", "n1"), ("n2",)),
        (["n1"], 4, (), ("n1",)),
        (["n1", "n1"], 3, ("n1",), ()),
        ([], 4, (), ()),
        (["x9"], 4, (), ()),
    ],
)
def test_the_best_proven_are_kept(wanted, needed, kept, given_up):
    found = avoidable(wanted, fixed=(), places=places("IDLE", "MIXED", "ALLOCATED", "IDLE"), needed=needed)
    assert (found.nodes, found.others) == (kept, given_up)
    assert bool(found.why_not) is bool(given_up)


def test_nodes_that_are_down_are_no_others():
    found = avoidable(["n1"], fixed=(), places=places("IDLE", "IDLE", "IDLE+DRAIN", "DOWN*"), needed=2)
    assert found == Avoided((), ("n1",), "the job needs 2 nodes, and 2 are up that are not excluded")
    # One that is down itself costs nothing.
    down = avoidable(["n4", "n1"], fixed=(), places=places("IDLE", "IDLE", "IDLE", "DOWN"), needed=2)
    assert down.nodes == ("n4", "n1")


def test_what_a_person_excluded_counts():
    found = avoidable(["n1", "n2"], fixed=["n3"], places=places(*4 * ["IDLE"]), needed=2)
    assert (found.nodes, found.others) == (("n1",), ("n2",))
    assert avoidable(["n3"], fixed=["n3"], places=places(*4 * ["IDLE"]), needed=2) == Avoided()


def test_powered_down_nodes_that_slurm_does_not_show_are_others():
    assert avoidable(["n1"], fixed=(), places=places("IDLE", "IDLE", unseen=3), needed=4).nodes == ("n1",)
    assert avoidable(["n1"], fixed=(), places=places("IDLE", "IDLE", unseen=3), needed=5).nodes == ()


def test_nodes_without_the_gpus_are_no_others():
    found = avoidable(["n1"], fixed=(), places=places("IDLE", "IDLE", needed_gpus=8), needed=1)
    assert found == Avoided(), "and need not be excluded"
    assert avoidable(["n1"], fixed=(), places=places("IDLE", "IDLE", needed_gpus=4), needed=1).nodes == ("n1",)


def test_a_job_runs_in_one_of_its_partitions():
    """Two nodes here and two there are not four."""
    node = {"State": "IDLE", "Gres": "(null)"}
    names = {"n1": "a", "n2": "a", "n3": "b", "n4": "b,a"}
    nodes = {name: {**node, "Partitions": partitions} for name, partitions in names.items()}
    both = Places(nodes, {"a": 0, "b": 0})
    assert avoidable(["n1"], fixed=(), places=both, needed=3).nodes == ()
    assert avoidable(["n3"], fixed=(), places=both, needed=3).nodes == ("n3",)


def test_what_is_said():
    assert str(Avoided()) == ""
    assert str(Avoided(("n1", "n2"))) == "excluded nodes: n1, n2"
    assert str(Avoided(("n1",), ("n2",), "too few")) == "excluded nodes: n1; not excluded: n2 (too few)"


class Scheduler:
    """A Slurm of four nodes with one job of two.

    Args:
        excluded: ExcNodeList.
        state: of the job.
        takes: whether it takes changes.
    """

    def __init__(self, *, excluded: Sequence[str] = (), state: str = "PENDING", takes: bool = True) -> None:
        self.excluded, self.state, self.takes = list(excluded), state, takes
        self.changes: list[str] = []
        self.count = "2-2"

    def show_job(self, _: str) -> dict[str, str]:
        nodes = ",".join(self.excluded) or "(null)"
        return {"JobState": self.state, "ExcNodeList": nodes, "NumNodes": self.count, "Partition": "train"}

    def show_nodes(self, names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
        node = {"State": "IDLE", "Partitions": "train", "Gres": "gpu:4"}
        return {f"n{number}": node for number in range(1, 5) if not names or f"n{number}" in names}

    def ask(self, *command: str) -> str:
        if command[:2] != ("scontrol", "update"):
            raise AssertionError(command)
        self.changes.append(command[-1])
        if not self.takes:
            raise slurm.SlurmError(Problem("scontrol", None, "Requested node configuration is not available"))
        self.excluded = [name for name in command[-1].removeprefix("ExcNodeList=").split(",") if name]
        return ""


def avoid(monkeypatch, scheduler: Scheduler, wanted: Sequence[str], asked_before: Sequence[str] = ()) -> Avoided:
    for name in ("show_job", "show_nodes", "ask"):
        monkeypatch.setattr(slurm, name, getattr(scheduler, name))
    monkeypatch.setattr(slurm, "show_partitions", lambda: {"train": {"TotalNodes": "4"}})
    monkeypatch.setattr(slurm_allocation, "_SHOW_WAITS_S", ())
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
    job = SlurmAllocation(JobSettings(scheduler="slurm", signal_delay_s=60), environ)
    return job.avoid(wanted, asked_before=set(asked_before), job_id="7")


@pytest.mark.parametrize(
    ("before", "asked", "wanted", "changes", "in_force"),
    [
        ([], [], ["n2"], ["ExcNodeList=n2"], ("n2",)),
        (["n2"], ["n2"], ["n2"], [], ("n2",)),
        (["n2"], ["n2"], ["n3"], ["ExcNodeList=n3"], ("n3",)),
        (["n2"], ["n2"], [], ["ExcNodeList="], ()),  # the program was found out: the node is free
        (["n4"], [], [], [], ("n4",)),  # a person's stays
        (["n4"], [], ["n2"], ["ExcNodeList=n2,n4"], ("n2", "n4")),
        (["n2", "n4"], ["n2"], [], ["ExcNodeList=n4"], ("n4",)),
        ([], [], [], [], ()),
    ],
)
def test_what_is_excluded(monkeypatch, before, asked, wanted, changes, in_force):
    scheduler = Scheduler(excluded=before)
    found = avoid(monkeypatch, scheduler, wanted, asked)
    assert scheduler.changes == changes
    assert found == Avoided(in_force)


def test_no_more_than_the_job_can_spare(monkeypatch):
    scheduler = Scheduler()
    found = avoid(monkeypatch, scheduler, ["n3", "n1", "n2"])
    assert (found.nodes, found.others) == (("n1", "n3"), ("n2",))
    assert found.why_not == "the job needs 2 nodes, and 2 are up that are not excluded"


def test_a_job_that_has_started_again(monkeypatch):
    scheduler = Scheduler(excluded=["n3"], state="RUNNING")
    found = avoid(monkeypatch, scheduler, ["n2", "n3"])
    assert found == Avoided(("n3",), ("n2",), "the job has started again already")
    assert scheduler.changes == []


def test_a_change_that_slurm_refuses(monkeypatch):
    with pytest.raises(slurm.SlurmError, match="not available"):
        avoid(monkeypatch, Scheduler(takes=False), ["n2"])


def test_a_job_that_is_still_ending_needs_as_many_nodes_as_ever(monkeypatch):
    """Slurm counts the nodes that it has not taken back yet."""
    scheduler = Scheduler()
    scheduler.count = "1"
    found = avoid(monkeypatch, scheduler, ["n2", "n3", "n4"])
    assert (found.nodes, found.others) == (("n2", "n3"), ("n4",))
