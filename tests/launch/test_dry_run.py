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


def test_spare_nodes_are_asked_for_and_cost():
    words = ("qwen2_5_7b", "--nodes", 4, "--cluster", "h200_efa", "--spares", 1)
    shown = json.loads(run("launch.command", "dry-run", *words, "--json", check=True).stdout)
    assert (shown["ranks"], shown["spares"]) == (32, 1)
    for expected in ("#SBATCH --nodes=5", "#SBATCH --no-kill", "#SBATCH --requeue"):
        assert expected in shown["sbatch"]
    text = run("launch.command", "dry-run", *words, check=True).stdout
    assert "1: 8 GPUs that wait for one of the others to fail, 20.0% of the job" in text
    used = shown["predicted"]["gpu_hours"]
    assert f"{used:,.0f}, and {used / 4:,.0f} of spare nodes" in text


def test_spare_nodes_that_cannot_be():
    few = run("launch.command", "dry-run", "qwen2_5_7b", "--spares", -1)
    assert (few.returncode, "--spares = -1: must be at least 0." in few.stderr) == (2, True)
    alone = run("launch.command", "dry-run", "tiny_dense", "--cluster", "local", "--spares", 1)
    assert (alone.returncode, "is one machine; leave it out." in alone.stderr) == (2, True)
