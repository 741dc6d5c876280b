"""A dry run shows everything a submission would do."""

import json

import pytest

from tests.conftest import run


def test_the_72b_on_128_nodes():
    done = run("launch.command", "dry-run", "qwen2_5_72b", "--nodes", 128, check=True)
    for expected in (
        "num_layers: 80",
        "#SBATCH --nodes=128",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --requeue",
        "memory of the fullest rank",
        "tokens/s",
        "duration",
        "GPU-hours",
        "checkpoint",
        "to do: data.path",
    ):
        assert expected in done.stdout, expected


def test_json_and_a_chain():
    words = ("qwen2_5_7b", "--nodes", 4, "--cluster", "h200_efa", "--chain", 3, "--json")
    shown = json.loads(run("launch.command", "dry-run", *words, check=True).stdout)
    assert shown["ranks"] == 32
    assert "#SBATCH --no-requeue" in shown["sbatch"]
    predicted = shown["predicted"]
    assert predicted["gpu_hours"] == pytest.approx(predicted["hours"] * 32)
    assert (
        predicted["tokens"] == predicted["tokens_per_second"] * predicted["hours"] * 3600 // 1
        or predicted["tokens"] > 0
    )
    assert predicted["memory_gib"] > predicted["memory_state_gib"]


def test_a_wrong_layout_is_exit_2_and_shows_the_rest():
    done = run("launch.command", "dry-run", "qwen2_5_7b", "parallel.tensor_model_parallel_size=3", "--nodes", 1)
    assert done.returncode == 2
    assert "must divide the 4 KV heads" in done.stdout
    assert "#SBATCH" in done.stdout


def test_the_local_cluster_has_no_script():
    done = run("launch.command", "dry-run", "tiny_dense", "--cluster", "local", check=True)
    assert "#SBATCH" not in done.stdout
    assert "on this machine" in done.stdout
