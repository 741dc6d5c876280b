"""docs/install.md: its commands for a machine without a GPU run as typed, and it says what the code does.

They run in a checkout whose project has no dependencies, so that its environment takes seconds; CI makes the real one.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.gpu_packages import BUILDS, LEFT_OUT
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "install.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "megatron_qwen"
version = "0.1.0"
[project.optional-dependencies]
hf = []
[tool.setuptools]
packages = []
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """This checkout's programs in a project without dependencies."""
    root = tmp_path_factory.mktemp("page") / "checkout"
    root.mkdir()
    shutil.copy(ROOT / "mq", root / "mq")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("launch", "megatron_qwen"):
        shutil.copytree(ROOT / name, root / name, ignore=leave)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "constraints.txt").write_text("")
    return root


def test_the_commands_of_the_page(checkout):
    kept = {name: value for name, value in os.environ.items() if name not in ("MQ_VENV", "MQ_PYTHON", "PYTHONPATH")}
    said = {}
    for line in COMMANDS:
        if line.startswith("PIP_NO_INDEX"):
            shutil.rmtree(checkout / ".venv")  # another machine
        done = subprocess.run(
            ["bash", "-c", line], cwd=checkout, env=kept, capture_output=True, text=True, timeout=300, check=False
        )
        # doctor ends with 1 here: the stand-in has no torch.
        expected = 1 if line == "./mq doctor" else 0
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        said[line] = done.stdout
    assert "mq setup " in said["./mq --help"]
    assert "FP8 GEMM" in said["./mq doctor"]
    (elsewhere,) = (text for line, text in said.items() if line.startswith("MQ_VENV="))
    assert elsewhere.startswith("environment: /tmp/other-environment, Python 3.1")
    assert not Path("/tmp/other-environment").exists()
    (driver,) = (text for line, text in said.items() if "--driver" in line)
    assert "torch==2.14.0+cu126" in driver
    assert list((checkout / "wheels").glob("setuptools-*.whl"))


def test_the_table_of_drivers_is_that_of_the_code():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    newest, older = BUILDS
    by_driver = {row[0]: row for row in rows if row[0][:3].isdecimal()}
    assert list(by_driver) == [
        f"{newest.oldest_driver} or newer",
        f"{older.oldest_driver} to {newest.oldest_driver - 1}",
    ]
    for build, row in zip(BUILDS, by_driver.values(), strict=True):
        assert row[1] == str(build.cuda)
        assert build.dali.split(">=")[0] in row[3]
        assert "({}.{})".format(*build.oldest_gpu) in row[4]
    assert older.torch.removeprefix("torch==").split("+")[0] in by_driver[f"{older.oldest_driver} to 579"][2]
    assert newest.torch is None


def test_what_is_left_out_is_named():
    for name in ("NVIDIA apex", "flash-attention"):
        assert f"| {name} | not installed" in PAGE
    assert [name for name, _ in LEFT_OUT] == ["apex", "flash-attn"]


@pytest.mark.parametrize(
    ("symptom", "source"),
    [
        ("no Python 3.12 or 3.13 found", "mq"),
        ("the set-up failed; the log is", "mq"),
        ("exists and is not a Python environment", "mq"),
        ("waiting for another mq", "mq"),
        ("no NVIDIA driver on this machine", "launch/setup.py"),
        ("no build of torch fits driver", "launch/gpu_packages.py"),
        ("CANNOT: ", "launch/installation.py"),
        ("FAILED: ", "launch/installation.py"),
        ("finds no GPU", "megatron_qwen/models/fp8_check.py"),
        ("a scale is wrong", "megatron_qwen/models/fp8_check.py"),
        ("undefined symbol", "launch/fp8_proof.py"),
    ],
)
def test_symptoms_are_messages_that_exist(symptom, source):
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert any(symptom in row.split("|")[1] for row in rows)
    assert symptom in (ROOT / source).read_text()


def test_other_pages_lead_here():
    for path in ("README.md", "docs/architecture.md"):
        assert "install.md" in (ROOT / path).read_text()
