"""``mq setup``: what it plans by what nvidia-smi says, and how it carries that out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.gpu_packages import BUILDS, steps
from launch.installation import Places, carry_out
from tests.conftest import ROOT

H100 = "NVIDIA H100 80GB HBM3, {driver}, 9.0"
CUDA_13, CUDA_12 = BUILDS


@pytest.fixture
def mq(tmp_path):
    """Runs the real `mq` with an environment that does not exist, on a machine with this nvidia-smi."""

    def call(*arguments: str, nvidia_smi: str | None = None) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        if nvidia_smi is not None:
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
            (programs / "nvidia-smi").chmod(0o755)
        own = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "MQ_VENV": str(tmp_path / "env"),
            "MQ_PYTHON": sys.executable,
        }
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUDA_HOME")}
        command = [str(ROOT / "mq"), "setup", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**kept, **own}, cwd="/", timeout=60)

    return call


def test_a_plan_for_a_new_driver(mq, tmp_path):
    done = mq("--gpu", "--dry-run", nvidia_smi=f"for i in 1 2; do echo '{H100.format(driver='580.159.04')}'; done")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "driver 580.159.04: 2 x NVIDIA H100 80GB HBM3",
        "CUDA 13: the newest that this driver and these GPUs run",
    ]
    assert f"environment: {tmp_path / 'env'}, Python 3.1" in lines[2]
    assert "  torch==" not in done.stdout, "the torch of constraints.txt fits"
    assert "nvidia-dali-cuda130" in done.stdout
    assert "PyPI is another project" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "a dry run changes nothing"


def test_a_plan_for_an_older_driver(mq):
    done = mq("--gpu", "--dry-run", nvidia_smi=f"echo '{H100.format(driver='535.216.03')}'")
    assert done.returncode == 0, done.stderr
    for word in ("CUDA 12", "  torch==2.14.0+cu126", "nvidia-dali-cuda120", "transformer-engine-cu12=="):
        assert word in done.stdout


def test_the_plan_as_json(mq):
    plan = json.loads(mq("--gpu", "--driver", "570.124.06", "--dry-run", "--json").stdout)
    assert (plan["driver"], plan["cuda"]) == ("570.124.06", 12)
    assert plan["pins"][-1] == "torch==2.14.0+cu126"
    assert [step["builds"] for step in plan["steps"]] == [False] * (len(plan["steps"]) - 1) + [True]
    without = json.loads(mq("--dry-run", "--json").stdout)
    assert (without["driver"], without["cuda"], without["steps"]) == (None, None, [])


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_without_a_driver_nothing_is_changed(options, mq, tmp_path):
    done = mq("--gpu", *options)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no NVIDIA driver on this machine")
    for word in ("580 or newer", "--driver", "on a GPU node"):
        assert word in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        (f"echo '{H100.format(driver='470.82.01')}'", "CUDA 12: needs a driver of at least 525"),
    ],
)
def test_a_driver_that_cannot_be_used_changes_nothing(script, word, mq, tmp_path):
    done = mq("--gpu", nvidia_smi=script)
    assert (done.returncode, done.stdout) == (1, "")
    assert word in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    "options", [["--driver", "570.124.06"], ["--gpu", "--driver", "new"], ["--json"], ["--gpus"], ["extra"]]
)
def test_bad_usage(options, mq, tmp_path):
    done = mq(*options)
    assert done.returncode == 2
    assert done.stderr.startswith("configuration error: ")
    assert not (tmp_path / "env").exists()


def test_it_needs_the_standard_library_alone():
    """Before there is an environment there is nothing else."""
    command = [sys.executable, "-S", "-P", "-m", "launch.setup", "--gpu", "--driver", "580.65.06", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


PIP = """#!/bin/sh
# Stands in for the environment's Python: notes what pip is asked and what its builds see.
echo "$@" >>{log}
case "$*" in *"$FAILS"*) echo "ERROR: no such package" >&2; exit 1 ;; esac
case "$*" in *no-build-isolation*) env >{log}.environment ;; esac
"""


@pytest.fixture
def places(tmp_path, monkeypatch) -> Places:
    """A checkout whose `mq setup` makes an environment with a stand-in for Python, and with torch."""
    monkeypatch.setenv("FAILS", "nothing fails")
    places = Places(tmp_path / "checkout", tmp_path / "env")
    places.root.mkdir()
    lines = [
        "#!/bin/sh",
        f'[ "$*" = setup ] && [ "$MQ_VENV" = {places.venv} ] || exit 2',
        '[ "$FAILS" != setup ] || exit 1',
        f"mkdir -p {places.venv}/bin {places.site}/torch-2.15.0.dist-info",
        f"cp {tmp_path}/python {places.venv}/bin/python",
    ]
    (tmp_path / "python").write_text(PIP.format(log=tmp_path / "calls"))
    (places.root / "mq").write_text("\n".join(lines) + "\n")
    for path in (tmp_path / "python", places.root / "mq"):
        path.chmod(0o755)
    return places


def calls(tmp_path: Path) -> list[str]:
    """Calls of pip, as one line each."""
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.is_file() else []


PLAN = list(steps(CUDA_13, has_cxx=True))


def test_everything_is_installed_in_order_with_the_pins(places, tmp_path):
    assert carry_out(CUDA_13, PLAN, places) == []
    pip = [line for line in calls(tmp_path) if "pip install" in line]
    assert len(pip) == len(PLAN)
    assert all(line.endswith(f"-c {places.venv}/constraints.txt") for line in pip)
    assert "transformer-engine-torch" in pip[-1]
    assert "--no-cache-dir" in pip[-1]
    seen = dict(line.split("=", 1) for line in (tmp_path / "calls.environment").read_text().splitlines() if "=" in line)
    assert seen["NVTE_BUILD_USE_NVIDIA_WHEELS"] == "1"
    assert seen["PATH"].startswith(f"{places.venv}/bin:")
    assert not places.pins.exists()


def test_the_extension_is_compiled_again_for_another_torch_only(places, tmp_path):
    def removals() -> int:
        return sum("pip uninstall" in line and "transformer-engine-torch" in line for line in calls(tmp_path))

    assert carry_out(CUDA_13, PLAN, places) == []
    assert removals() == 1
    assert carry_out(CUDA_13, PLAN, places) == []
    assert removals() == 1
    (places.site / "torch-2.15.0.dist-info").rename(places.site / "torch-2.16.0.dist-info")
    (places.root / "mq").write_text((places.root / "mq").read_text().replace("torch-2.15.0", "torch-2.16.0"))
    assert carry_out(CUDA_13, PLAN, places) == []
    assert removals() == 2


def test_a_step_that_fails_is_named_and_the_others_go_on(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "nvidia-dali")
    assert carry_out(CUDA_13, PLAN, places) == ["DALI for CUDA 13"]
    printed = capsys.readouterr().out
    assert "ERROR: no such package" in printed
    assert f"FAILED: DALI for CUDA 13; the log is {places.log}" in printed
    assert "transformer-engine-torch" in calls(tmp_path)[-1]


def test_what_the_machine_lacks_is_a_failure(places, tmp_path, capsys):
    planned = list(steps(CUDA_12, has_cxx=False))
    assert carry_out(CUDA_12, planned, places) == ["Transformer Engine's extension for torch"]
    assert "CANNOT: Transformer Engine's extension for torch: it is compiled, and there is" in capsys.readouterr().out
    assert not any("transformer-engine-torch" in line for line in calls(tmp_path))


def test_pins_are_those_of_the_driver(places, monkeypatch):
    carry_out(CUDA_12, [], places)
    assert places.pins.read_text() == CUDA_12.pins
    carry_out(None, [], places)
    assert places.pins.read_text() == CUDA_12.pins, "without --gpu the choice stays"
    monkeypatch.setenv("FAILS", "setup")
    assert carry_out(CUDA_13, [], places) == ["environment"]
    assert places.pins.read_text() == CUDA_12.pins, "what failed is undone"
    monkeypatch.setenv("FAILS", "nothing fails")
    carry_out(CUDA_13, [], places)
    assert not places.pins.exists()
