"""What nvidia-smi and the kernel module print, and what is made of it."""

from pathlib import Path

import pytest

from launch.nvidia_driver import DriverError, Gpu, find, parse_module, parse_query, shown

MODULE = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.195.03  Release Build  (dvs-builder@U22-I3)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\n"
NO_MODULE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n\n"
)


@pytest.mark.parametrize(
    ("text", "version", "gpus"),
    [
        ("NVIDIA H200, 580.159.04, 9.0\n", (580, 159, 4), [Gpu("NVIDIA H200", (9, 0))]),
        ("NVIDIA H100 80GB HBM3, 535.216.03, 9.0\n" * 8, (535, 216, 3), [Gpu("NVIDIA H100 80GB HBM3", (9, 0))] * 8),
        ("NVIDIA GeForce RTX 5090, 580.142, 12.0\n", (580, 142), [Gpu("NVIDIA GeForce RTX 5090", (12, 0))]),
        ("Tesla V100-SXM2-32GB, 470.82.01\n", (470, 82, 1), [Gpu("Tesla V100-SXM2-32GB", None)]),
        (
            "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\nNVIDIA H200, 580.159.04, 9.0\n",
            (580, 159, 4),
            [Gpu("NVIDIA H200", (9, 0))],
        ),
        ("NVIDIA A100-SXM4-80GB, 550.54.15, [N/A]\n", (550, 54, 15), [Gpu("NVIDIA A100-SXM4-80GB", None)]),
    ],
)
def test_what_nvidia_smi_lists(text, version, gpus):
    driver = parse_query(text)
    assert driver.version == version
    assert list(driver.gpus) == gpus


@pytest.mark.parametrize("text", ["", NO_MODULE, MISMATCH, "No devices were found\n", "GPU, [N/A], [N/A]\n"])
def test_what_is_no_list(text):
    assert parse_query(text) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (MODULE, (570, 195, 3)),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", (535, 104, 5)),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.142  Release Build\n", (580, 142)),
        ("GCC version:  gcc version 12.3.0\n", None),
    ],
)
def test_what_the_kernel_module_says(text, version):
    assert parse_module(text) == version


def test_a_version_is_shown_as_nvidia_writes_it():
    assert [shown(parse_query(f"GPU, {text}").version) for text in ("570.124.06", "580.142")] == [
        "570.124.06",
        "580.142",
    ]


def fake_nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An executable of that name, the only one on PATH besides the system's own."""
    directory.mkdir(exist_ok=True)
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_an_old_nvidia_smi_is_asked_without_the_capability(tmp_path, monkeypatch):
    script = """case "$*" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;; esac
    echo 'Tesla V100-SXM2-32GB, 470.82.01'"""
    fake_nvidia_smi(tmp_path / "bin", monkeypatch, script)
    assert find().version == (470, 82, 1)


@pytest.mark.parametrize("said", [NO_MODULE, MISMATCH, "No devices were found"])
def test_a_driver_that_fails_is_named(said, tmp_path, monkeypatch):
    (tmp_path / "said").write_text(said)
    fake_nvidia_smi(tmp_path / "bin", monkeypatch, f"cat {tmp_path / 'said'}; exit 9")
    with pytest.raises(DriverError) as error:
        find()
    assert said.split("\n")[0][:100] in str(error.value)
    assert "modprobe nvidia" in str(error.value)
    assert error.value.exit_code == 1


def test_without_nvidia_smi_the_module_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find(tmp_path / "version") is None
    (tmp_path / "version").write_text(MODULE)
    driver = find(tmp_path / "version")
    assert driver.version == (570, 195, 3)
    assert driver.gpus == ()
