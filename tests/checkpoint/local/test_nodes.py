"""Who keeps whose piece, and where."""

import shutil
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.local.nodes import Nodes, expand, is_private, make_private, node_name, place_of_run
from megatron_qwen.errors import ConfigError


def spread(**nodes: int) -> Nodes:
    return Nodes(tuple(name for name, count in nodes.items() for _ in range(count)))


def test_partners_are_the_same_place_on_the_node_beside():
    nodes = spread(a=2, b=2, c=2, d=2)
    assert [nodes.partners(rank) for rank in range(8)] == [
        (0, 2), (1, 3), (0, 2), (1, 3), (4, 6), (5, 7), (4, 6), (5, 7),
    ]  # fmt: skip


def test_an_odd_node_joins_a_pair():
    assert [spread(a=1, b=1, c=1).partners(rank) for rank in range(3)] == [(0, 1, 2)] * 3
    nodes = spread(a=1, b=1, c=1, d=1, e=1)
    assert [nodes.partners(rank) for rank in range(5)] == [(0, 1), (0, 1), (2, 3, 4), (2, 3, 4), (2, 3, 4)]


def test_one_node_has_no_partner():
    assert [spread(a=4).partners(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]


def test_a_rank_without_its_like_is_alone():
    assert [spread(a=3, b=2).partners(rank) for rank in range(5)] == [(0, 3), (1, 4), (2,), (0, 3), (1, 4)]


@pytest.mark.parametrize("counts", [(1,), (2, 2), (1, 3), (2, 2, 2), (8,) * 7, (8,) * 8, (3, 1, 2, 2, 5)])
def test_partners_agree_and_are_on_different_nodes(counts):
    nodes = spread(**{f"n{number}": count for number, count in enumerate(counts)})
    for rank in range(sum(counts)):
        partners = nodes.partners(rank)
        assert rank in partners
        assert all(nodes.partners(other) == partners for other in partners)
        assert len({nodes.of_rank[other] for other in partners}) == len(partners) <= 3


def test_the_directory_on_a_node():
    environ = {"SLURMD_NODENAME": "n3", "SCRATCH": "/nvme/me"}
    assert node_name(environ) == "n3"
    assert expand("/dev/shm", run_dir=Path("/runs/a"), environ=environ) == Path("/dev/shm")
    assert expand("$SCRATCH/%n", run_dir=Path("/runs/a"), environ=environ) == Path("/nvme/me/n3")
    assert expand("${SCRATCH}/x", run_dir=Path("/runs/a"), environ=environ) == Path("/nvme/me/x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("$NOWHERE/x", "a variable that is not set"),
        ("shm", "must be an absolute path"),
        ("/runs/a/local", "lies in the run directory"),
    ],
)
def test_what_cannot_be_a_directory_of_a_node(text, says):
    with pytest.raises(ConfigError, match=says):
        expand(text, run_dir=Path("/runs/a"), environ={"SLURMD_NODENAME": "n3"})


def test_a_directory_that_others_can_write_to_is_not_used(tmp_path):
    directory = place_of_run(tmp_path, "0123")
    assert not is_private(directory)
    make_private(directory)
    assert is_private(directory)
    directory.chmod(0o777)
    assert not is_private(directory)
    with pytest.raises(PermissionError):
        make_private(directory)
    directory.chmod(0o700)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(directory, elsewhere)
    shutil.rmtree(directory)
    directory.symlink_to(elsewhere)
    assert not is_private(directory)
