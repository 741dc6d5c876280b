"""Benchmarks run: the smallest turn of those that need neither hours nor a GPU, and what they answer with."""

import json

import pytest
import yaml

from tests.conftest import run
from tests.tiers import thorough


def rows(name: str, *arguments: object) -> list[dict]:
    done = run("tools.dev.bench", name, "--rounds", 1, "--json", *arguments, timeout_s=500)
    assert done.returncode in (0, 1), done.stderr  # 1: a ratio was missed, which a busy machine may
    return json.loads(done.stdout)


@thorough("the other benchmarks run")
def test_layer():
    found = rows("layer")
    assert [row["benchmark"] for row in found] == [
        f"layer {kind} {dtype}" for kind in ("dense", "moe") for dtype in ("fp32", "bf16")
    ]
    assert all(row["ours"] > 0 and row["against"] > 0 for row in found)


def test_collectives():
    found = rows("collectives")
    assert {row["benchmark"].split(",")[0] for row in found} == {
        "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send and receive",
    }  # fmt: skip
    assert all(0 < row["ratio"] < 5 for row in found)


def test_peaks_are_a_hardware_file(tmp_path):
    """What was measured here plans a run here."""
    found = rows("peaks", "--hardware", tmp_path / "here.yaml")
    content = yaml.safe_load((tmp_path / "here.yaml").read_text())
    copy = next(row for row in found if row["benchmark"].startswith("copy"))
    assert content["memory_gb_s"] == pytest.approx(copy["ours"])
    assert content["fp8"] is None
    words = ["demo", "--gpus", 1, "--gpu", tmp_path / "here.yaml", "precision.dtype=bf16", "--json"]
    plan = json.loads(run("tools.plan", *words, check=True).stdout)
    assert plan["layouts"][0]["tokens_per_second_per_device"] > 0
    refused = run("tools.dev.bench", "startup", "--hardware", tmp_path / "no.yaml")
    assert refused.returncode == 2
