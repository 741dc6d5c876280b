"""``mq doctor``: the GPU part, with a fake nvidia-smi; the FP8 check runs in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor
from launch.doctor import examine
from launch.fp8_proof import Proof
from tests.conftest import environment


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this process see a driver through a fake nvidia-smi, and a result of the FP8 check."""

    def become(script: str, proof: Proof) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        asked: list[str] = []
        monkeypatch.setattr(doctor, "prove", lambda python: asked.append(python) or proof)
        monkeypatch.setattr(doctor, "_slurm", lambda: iter(()))
        seen = {item.what: item for item in examine()}
        become.seen, become.asked = seen, asked

    return become


H200 = "echo 'NVIDIA H200, 580.159.04, 9.0'"


@pytest.mark.parametrize(("state", "shown"), [("ok", "ok"), ("wrong", "lacks"), ("not tried", "note")])
def test_a_gpu_is_proved_by_an_fp8_gemm(state, shown, machine):
    machine(H200, Proof(state, "as it was found", "do this"))
    assert machine.seen["GPUs"].found == "1 x NVIDIA H200, driver 580.159.04"
    item = machine.seen["FP8 GEMM"]
    assert (item.state, item.found, item.fix) == (shown, "as it was found", "do this")
    assert machine.asked == [sys.executable]


def test_a_driver_that_fails_is_not_tried(machine):
    machine("echo 'No devices were found'; exit 6", Proof("ok", ""))
    assert machine.seen["GPUs"].state == "lacks"
    assert "No devices were found" in machine.seen["GPUs"].found
    assert "modprobe" in machine.seen["GPUs"].fix
    assert "FP8 GEMM" not in machine.seen
    assert machine.asked == []


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_it_says_so_and_imports_no_torch():
    command = [sys.executable, "-X", "importtime", "-P", "-m", "launch.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "json" in imported
    assert not imported & {"torch", "numpy", "megatron", "transformer_engine"}
    found = {item["what"]: item for item in json.loads(done.stdout)}
    assert found["FP8 GEMM"] == {"what": "FP8 GEMM", "state": "note", "found": "not tried: no GPU", "fix": ""}


@pytest.mark.parametrize(
    ("foreign", "nvidia", "state", "found"),
    [
        (True, False, "note", "another project of that name"),
        (False, True, "ok", "there"),
        (False, False, "ok", "not installed; its kernels are optional"),
    ],
)
def test_the_other_apex_is_told_apart(foreign, nvidia, state, found, machine, monkeypatch):
    monkeypatch.setattr(doctor, "foreign_apex_is_here", lambda: foreign)
    monkeypatch.setattr(doctor, "nvidia_apex_is_here", lambda: nvidia)
    machine(H200, Proof("ok", ""))
    assert (machine.seen["apex"].state, machine.seen["apex"].found) == (state, found)
