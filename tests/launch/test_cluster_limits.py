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
    ],
)
def test_the_size_of_an_array(said, tasks, refused, answers):
    answers["config"] = said
    found = array_limit(tasks)
    assert bool(found) is refused
    assert not found or "MaxArraySize allows 5" in str(found[0])
