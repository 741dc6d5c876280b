"""Cluster files: the examples, and what is said of wrong ones."""

import pytest

from launch import cluster
from launch.cluster import known_clusters, load, read, reference
from megatron_qwen.config.fields import field_infos
from megatron_qwen.errors import ConfigError


@pytest.mark.parametrize("name", known_clusters())
def test_examples_load(name):
    assert load(name).ranks >= 1


def test_the_examples_are_those_of_the_issue():
    assert set(known_clusters()) == {"cpu", "h100_infiniband", "h200_efa", "local"}
    assert load("local").scheduler == "local"


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        read({"partitoin": "a", "gpus_per_node": "eight", "environment": [1], "time_limit": 3.5}, origin="x.yaml")
    text = caught.value.render()
    assert "x.yaml: partitoin: no such field. Did you mean partition?" in text
    assert "x.yaml: gpus_per_node = 'eight': must be int" in text
    assert "environment = [1]: must be mapping of text to text" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"time_limit": "tomorrow"}, "must be a time as Slurm writes it"),
        ({"time_limit": "5:00", "signal_delay_s": 300}, "must be shorter than time_limit"),
        ({"container": "pyxis"}, "container and container_image require each other"),
        ({"gpu_type": "h100", "gpus_per_node": 0}, "requires gpus_per_node above 0"),
        ({"environment": {"A B": "x"}}, "is not a name of an environment variable"),
        ({"sbatch": {"a;b": "x"}}, "is not an option of sbatch"),
        ({"gpus_per_node": -1}, "must be at least 0"),
        ({"partition": "a\nb"}, "holds the control character U+000A"),
    ],
)
def test_values_that_cannot_be(content, expected):
    with pytest.raises(ConfigError, match=expected.replace("+", r"\+")):
        read({"gpus_per_node": 8, **content}, origin="x.yaml")


def test_numbers_of_a_mapping_become_text():
    found = read({"gpus_per_node": 8, "environment": {"NCCL_DEBUG": "INFO", "N": 1, "B": True}}, origin="x")
    assert found.environment == {"NCCL_DEBUG": "INFO", "N": "1", "B": "true"}


def test_a_cluster_that_does_not_exist():
    with pytest.raises(ConfigError, match="Did you mean h100_infiniband"):
        load("h100_infinband")


def test_every_field_is_documented():
    for name, info in field_infos("cluster", cluster.Cluster).items():
        assert info.doc.endswith(".")
        assert f"`{name}`" in reference()
