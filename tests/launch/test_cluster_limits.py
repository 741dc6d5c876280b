"""What Slurm says of itself before a job waits: partitions, nodes that are off, the size of arrays."""

from dataclasses import replace

import pytest

from launch import request as requests
from launch.cluster_limits import array_limit, cluster_limits
from megatron_qwen import slurm


def partition(name: str, limit: str = "2-00:00:00", **more: str) -> str:
    fields = {"PartitionName": name, "Default": "NO", "MaxNodes": "UNLIMITED", "MaxTime": limit, "State": "UP", **more}
    return " ".join(f"{key}={value}" for key, value in fields.items())


def node(name: str, partitions: str, state: str = "IDLE", gpus: int = 8) -> str:
    return f"NodeName={name} Gres=gpu:h100:{gpus} State={state} Partitions={partitions}"


PARTITIONS = [
    partition("gpu", Default="YES"),
    partition("debug", "00:30:00"),
    partition("short", "01:00:00"),
    partition("small", MaxNodes="1"),
    partition("off", State="DOWN"),
]
NODES = [node(f"a{index}", "gpu,debug,short,small,off") for index in range(3)]


@pytest.fixture
def answers(monkeypatch):
    """Slurm's answers, by the last words of the question."""
    said = {"partition -o": "\n".join(PARTITIONS), "node -o": "\n".join(NODES), "config": "MaxArraySize = 1001"}
    monkeypatch.setattr(
        slurm, "ask", lambda *words, **_: next(v for k, v in said.items() if " ".join(words).endswith(k))
    )
    return said


def findings(names: str | None, nodes: int = 2) -> list[str]:
    request = requests.make("qwen2_5_7b", [], nodes=nodes, cluster="h100_infiniband", dry=True)
    cluster = replace(request.cluster, partition=names, time_limit="4:00:00", gpus_per_node=8)
    return [str(item) for item in cluster_limits(replace(request, cluster=cluster))]


@pytest.mark.parametrize(
    ("names", "nodes", "told"),
    [
        (None, 2, []),
        ("gpu", 2, []),
        ("gpu,debug", 2, []),  # the job goes to the one that takes it
        ("debug,gpu", 2, []),
        ("debug, gpu", 2, []),
        ("off,gpu", 2, []),
        ("small,gpu", 2, []),
        ("debug,short", 2, ["00:30:00 of partition debug", "01:00:00 of partition short"]),
        ("small,debug", 2, ["partition small allows 1", "00:30:00 of partition debug"]),
        ("off", 2, ["is DOWN"]),
        ("gpu,gppu", 2, ["no such partition. Did you mean gpu?"]),  # sbatch refuses a list with an unknown one
        ("gpu,debug", 4, ["partition gpu has 3 nodes", "00:30:00", "partition debug has 3 nodes"]),
    ],
)
def test_one_partition_of_a_list_that_takes_the_job_is_enough(names, nodes, told, answers):
    found = findings(names, nodes)
    assert len(found) == len(told), found
    for text, words in zip(found, told, strict=True):
        assert words in text


@pytest.mark.parametrize(
    ("names", "nodes", "told"),
    [
        ("gpu,debug", 2, ["00:30:00 of partition debug"]),
        ("small,gpu,short", 2, ["partition small allows 1", "01:00:00 of partition short"]),
        ("debug,off", 2, ["00:30:00 of partition debug"]),
        ("off,gpu", 2, []),  # sbatch queues a job for a partition that is DOWN
        ("gpu,gpu", 2, []),
    ],
)
def test_every_partition_of_a_list_must_take_the_job_where_slurm_enforces_it(names, nodes, told, answers):
    answers["config"] = "EnforcePartLimits       = ALL\nMaxArraySize = 1001"
    found = findings(names, nodes)
    assert len(found) == len(told), found
    for text, words in zip(found, told, strict=True):
        assert words in text
        assert text.startswith("ERROR")
        assert "EnforcePartLimits=ALL" in text


def test_any_partition_is_enough_with_the_other_values(answers):
    for value in ("ANY", "YES", "NO"):
        answers["config"] = f"EnforcePartLimits       = {value}"
        assert findings("gpu,debug") == []


@pytest.mark.parametrize(
    ("total", "shown", "nodes", "told"),
    [
        (8, [], 2, "warning: --nodes = 2: Slurm shows 0 of the 8 nodes of partition cloud, and 0 of these"),
        (
            8,
            [node("c0", "cloud")],
            2,
            "warning: --nodes = 2: Slurm shows 1 of the 8 nodes of partition cloud, and 1 of",
        ),
        (8, [node("c0", "cloud"), node("c1", "cloud")], 2, None),
        (8, [], 9, "ERROR: --nodes = 9: partition cloud has 8 nodes."),
        (2, [node("c0", "cloud", gpus=4)], 2, "ERROR: gpus_per_node = 8: 0 nodes of partition cloud have that many"),
        (1, [node("c0", "cloud")], 2, "ERROR: --nodes = 2: partition cloud has 1 nodes."),
    ],
)
def test_cloud_nodes_that_are_powered_down_are_not_shown_and_count(total, shown, nodes, told, answers):
    answers["partition -o"] = partition("cloud", TotalNodes=str(total))
    answers["node -o"] = "\n".join(shown)
    found = findings("cloud", nodes)
    assert len(found) == (told is not None), found
    assert told is None or found[0].startswith(told)


def test_hidden_partitions_are_asked_for(monkeypatch):
    """scontrol shows hidden partitions, and nodes that are in no other, only with -a."""

    def ask(*words: str) -> str:
        if "-a" not in words:
            return ""
        return partition("secret", Hidden="YES") if "partition" in words else node("s0", "secret")

    monkeypatch.setattr(slurm, "ask", ask)
    assert findings("secret", 1) == []


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        ("IDLE", True),
        ("MIXED", True),
        ("ALLOCATED", True),
        ("IDLE+CLOUD+POWERED_DOWN", True),  # started on demand
        ("IDLE+CLOUD+POWERING_DOWN", True),
        ("ALLOCATED+CLOUD+POWERING_UP", True),
        ("IDLE+POWERED_DOWN", True),
        ("IDLE+PLANNED", True),
        ("IDLE+RESERVED", True),
        ("IDLE~", True),
        ("IDLE+DRAIN", False),
        ("IDLE+CLOUD+DRAIN+POWERED_DOWN", False),
        ("MIXED+DRAIN", False),
        ("DOWN", False),
        ("DOWN+CLOUD+POWERED_DOWN", False),
        ("DOWN*+NOT_RESPONDING", False),
        ("IDLE*", False),
        ("IDLE+NOT_RESPONDING", False),
        ("IDLE+MAINT+RESERVED", False),
        ("IDLE+REBOOT_REQUESTED", False),
        ("FUTURE", False),
        ("UNKNOWN", False),
    ],
)
def test_states_of_nodes(state, usable, answers):
    assert slurm.is_usable({"State": state}) is usable
    answers["node -o"] = "\n".join([node("a0", "gpu"), node("a1", "gpu", state)])
    found = findings("gpu")
    assert (found == []) is usable
    assert usable or "1 of 2 fitting nodes of partition gpu are up" in found[0]


def test_a_node_that_is_switched_off_during_a_job_is_lost():
    assert slurm.is_lost({"State": "IDLE+CLOUD+POWERED_DOWN"})


@pytest.mark.parametrize(
    ("said", "tasks", "refused"),
    [
        ("MaxArraySize            = 5\n", 5, False),
        ("MaxArraySize            = 5\n", 6, True),
        ("MaxJobCount = 10\nMaxArraySize = 1001\n", 1001, False),
        ("MaxJobCount = 10\n", 10_000, False),
        ("", 10_000, False),
        ("MaxArraySize = 0\n", 1, False),  # one task is submitted without an array
        ("MaxArraySize = 1\n", 1, False),
    ],
)
def test_the_size_of_an_array(said, tasks, refused, answers):
    answers["config"] = said
    found = array_limit(tasks)
    assert bool(found) is refused
    assert not found or "MaxArraySize allows 5" in str(found[0])


def test_arrays_that_are_turned_off(answers):
    answers["config"] = "MaxArraySize            = 0"
    (found,) = array_limit(2)
    assert str(found) == (
        "runs = 2: need a job array, which this cluster has turned off (MaxArraySize=0); submit them one by one."
    )


def test_spare_nodes_count(answers):
    """A job of two nodes and two spare ones does not fit on three."""
    request = requests.make("qwen2_5_7b", [], nodes=2, cluster="h100_infiniband", spares=2, dry=True)
    (found,) = cluster_limits(replace(request, cluster=replace(request.cluster, partition="gpu")))
    assert "--nodes + --spares = 4: partition gpu has 3 nodes." in str(found)
    assert cluster_limits(replace(request, spares=1, cluster=replace(request.cluster, partition="gpu"))) == []
