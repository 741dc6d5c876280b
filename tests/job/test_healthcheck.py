"""slurm/healthcheck.sh, with an nvidia-smi that says what a test wants."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from megatron_qwen.job import health
from tests.conftest import ROOT

SCRIPT = ROOT / "slurm/healthcheck.sh"
GOOD = ["0, 80000, 0, 40, 0x0000000000000000", "1, 80000, 0, 41, 0x0000000000000004"]


def check(tmp_path: Path, *arguments: object, gpus: list[str] | None = None) -> tuple[int, str]:
    """Exit code and line of a check on a machine with these GPUs (None: without a driver)."""
    if gpus is not None:
        program = tmp_path / "nvidia-smi"
        (tmp_path / "gpus").write_text("".join(line + "\n" for line in gpus))
        program.write_text(
            f'#!/bin/bash\nif [[ "$*" == *memory.free* ]]; then cat {tmp_path}/gpus; '
            f"else cut -d, -f1 {tmp_path}/gpus; fi\n"
        )
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n7"}
    done = subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode, done.stdout.strip()


def test_a_good_node(tmp_path):
    arguments = ("--gpus", 2, "--min-gpu-free-gib", 70, "--disk", tmp_path)
    assert check(tmp_path, *arguments, "--min-memory-gib", 1, "--max-gpu-celsius", 60, gpus=GOOD) == (
        0,
        "healthcheck n7: ok",
    )


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        (["--gpus", 4], GOOD, "2 of 4 GPUs"),
        (["--gpus", 1], ["0, 80000, 3, 40, 0x0"], "GPU 0 has 3 uncorrected ECC errors"),
        (["--gpus", 1, "--min-gpu-free-gib", 70], ["0, 1024, 0, 40, 0x0"], "GPU 0 has 1 GiB free"),
        (["--gpus", 1], ["0, 80000, 0, 40, 0x0000000000000040"], "GPU 0 is slowed down (0x0000000000000040)"),
        (["--gpus", 2], ["0, [N/A], [N/A], [N/A], [N/A]", "1, 80000, 3, 40, 0x0"], "GPU 1 has 3 uncorrected ECC"),
        (["--gpus", 1, "--max-gpu-celsius", 60], ["0, 80000, 0, 85, 0x0"], "GPU 0 is at 85 C"),
        (["--min-memory-gib", 100_000], None, "100000 wanted"),
        (["--disk", "/nowhere"], None, "/nowhere is not there"),
        (["--disk", "/tmp", "--min-disk-gib", 10_000_000], None, "free on /tmp"),
    ],
)
def test_a_bad_node(tmp_path, arguments, gpus, expected):
    code, line = check(tmp_path, *arguments, gpus=gpus)
    assert code == 1
    assert line.startswith("healthcheck n7: FAIL ")
    assert expected in line


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    code, line = check(tmp_path, "--gpus", 3, "--disk", "/nowhere", "--min-memory-gib", 100_000, gpus=GOOD)
    assert code == 1
    assert line.count(";") == 2


@pytest.mark.parametrize(
    ("times", "here", "expected"),
    [
        ({"n1": 65, "n2": 66, "n3": 64}, "n1", {}),  # srun waited a minute for its step: no clock is off
        ({"n1": 65, "n2": 126, "n3": 4}, "n1", {"n2": 61, "n3": -61}),
        ({"n2": 65, "n3": 64, "n4": 4}, "n1", {"n4": -60}),  # this node was not checked
        ({"n2": -100, "n3": -100, "n4": -100}, "n1", {"n2": -100, "n3": -100, "n4": -100}),  # before it was asked
        ({"n2": 200, "n3": 201}, "n1", {"n2": 110, "n3": 111}),  # behind the answer
        ({"n1": 65, "n2": 95}, "n1", {}),  # what is allowed
        ({"n1": 65, "n2": 96}, "n1", {"n2": 31}),
        ({}, "n1", {}),
    ],
)
def test_clocks_are_compared_with_each_other(times, here, expected):
    """Asked at 0, answered at 90."""
    text = "".join(f"clock {node}: {1_000_000 + at}, 30 s allowed\n" for node, at in times.items())
    found = health.wrong_clocks(text, began=1_000_000.0, ended=1_000_090.0, here=here)
    assert found == {node: f"the clock is {off} s off" for node, off in expected.items()}


def test_a_node_says_its_time(tmp_path):
    before = int(time.time())
    code, text = check(tmp_path, "--clock", "--max-skew-s", 7)
    line = re.fullmatch(r"clock n7: (\d+), 7 s allowed\nhealthcheck n7: ok", text)
    assert code == 0
    assert line is not None
    assert before <= int(line[1]) <= time.time()
    assert health.wrong_clocks(text, began=before, ended=time.time(), here=None) == {}
    assert health.wrong_clocks(text, began=before - 100, ended=before - 90, here=None) != {}


def test_an_option_that_does_not_exist(tmp_path):
    assert check(tmp_path, "--gpu", 3)[0] == 2


@pytest.mark.parametrize(
    ("why", "storage"),
    [
        ("0 GiB free on /runs/a b, 1 wanted", True),
        ("/runs/a is not there", True),
        ("/runs/a cannot be written; 0 GiB free on /runs/a, 1 wanted", True),
        ("GPU 3 has 2 uncorrected ECC errors", False),
        ("GPU 3 has 2 GiB free", False),
        ("2 GiB of host memory free, 4 wanted", False),
        ("0 GiB free on /runs/a, 1 wanted; GPU 0 is 95 C hot", False),
        ("the health check did not finish", False),
    ],
)
def test_what_is_of_the_file_system(why, storage):
    assert health.is_of_storage(why) is storage
