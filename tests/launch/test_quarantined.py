"""Nodes that a submission avoids, and what it says where it cannot."""

from dataclasses import replace

import pytest

from launch import request as requests
from launch.quarantined import ToAvoid, to_avoid
from launch.submission import script
from megatron_qwen import slurm
from megatron_qwen.errors import Problem
from megatron_qwen.resilience.quarantine import Quarantine


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cluster of four nodes, n2 and n3 of them in quarantine; its run root."""
    node = {"State": "IDLE", "Partitions": "train", "Gres": "gpu:8", "AvailableFeatures": "ib"}
    nodes = {f"n{number}": dict(node) for number in range(1, 5)}
    nodes["n4"]["AvailableFeatures"] = "(null)"
    monkeypatch.setattr(slurm, "show_nodes", lambda: nodes)
    monkeypatch.setattr(slurm, "show_partitions", lambda: {"train": {"TotalNodes": "4", "Default": "YES"}})
    store = Quarantine(tmp_path / ".quarantine")
    for name in ("n2", "n3"):
        store.put(name, hours=24, by="controller", why=f"{name} has failed 2 times")
    return tmp_path


def request(place, *, nodes=2, **cluster):
    made = requests.make("tiny_dense", [], nodes=nodes, cluster="h100_infiniband", name="run", dry=True)
    plain = {"partition": None, "account": None, "qos": None, "constraint": None, "run_root": str(place)}
    return replace(made, cluster=replace(made.cluster, **{**plain, "sbatch": {}, **cluster}))


def test_what_is_told_to_sbatch(place):
    asked = request(place)
    found = to_avoid(asked)
    assert set(found.nodes) == {"n2", "n3"}
    assert any(note.startswith("avoids n2 until 20") and note.endswith("n2 has failed 2 times") for note in found.notes)
    assert found.notes[-1] == f"nodes in quarantine: mq launch nodes --run-root {place}"
    assert "#SBATCH --exclude=n2,n3" in script(asked, exclude=("n2", "n3"))
    assert "exclude" not in script(asked)
    both = request(place, sbatch={"exclude": "x[1-2]"})
    assert "#SBATCH --exclude='x[1-2],n2'" in script(both, exclude=("n2",))
    short = request(place, sbatch={"x": "x1"})
    assert "#SBATCH --exclude=x1,n2" in script(short, exclude=("n2",))


@pytest.mark.parametrize(
    ("nodes", "cluster", "count", "told"),
    [
        (3, {}, 1, "the job needs 3 nodes, and 3 are up that are not excluded"),
        (4, {}, 0, "does not avoid"),
        (1, {"sbatch": {"exclude": "n1,n4"}}, 1, "does not avoid"),
        (2, {"constraint": "ib"}, 1, "does not avoid"),
        (2, {"gpus_per_node": 16}, 0, ""),
        (2, {"partition": "other"}, 0, ""),
        (2, {"quarantine_hours": 0.0}, 0, ""),
        (2, {"sbatch": {"nodelist": "n2,n3"}}, 0, "the cluster file names the nodes"),
    ],
)
def test_enough_nodes_are_left(place, nodes, cluster, count, told):
    found = to_avoid(request(place, nodes=nodes, **cluster))
    assert len(found.nodes) == count
    assert told in " ".join(found.notes)
    assert bool(told) or not found.notes


def test_nothing_prevents_a_submission(place, monkeypatch):
    (place / ".quarantine/n2.json").write_text("{")
    found = to_avoid(request(place))
    assert found.nodes == ("n3",)
    assert "n2.json cannot be read and is ignored" in found.notes[0]

    def silent():
        raise slurm.SlurmError(Problem("scontrol", None, "did not answer"))

    monkeypatch.setattr(slurm, "show_nodes", silent)
    found = to_avoid(request(place))
    assert found.nodes == ()
    assert "did not answer" in found.notes[-1]
    assert to_avoid(request(place / "elsewhere")) == ToAvoid()
