"""From a driver to CUDA to packages."""

import tomllib

import pytest

from launch.gpu_packages import BUILDS, choose, steps
from megatron_qwen.errors import UserError
from tests.conftest import ROOT

CUDA_13, CUDA_12 = BUILDS
HOPPER, BLACKWELL, AMPERE, VOLTA = (9, 0), (10, 0), (8, 0), (7, 0)


@pytest.mark.parametrize(
    ("driver", "capabilities", "cuda"),
    [
        ((580, 159, 4), [HOPPER], 13),
        ((580, 65, 6), [AMPERE, BLACKWELL], 13),
        ((610, 88), [], 13),
        ((579, 99), [HOPPER], 12),
        ((570, 124, 6), [HOPPER], 12),
        ((525, 60, 13), [AMPERE], 12),
        ((580, 159, 4), [VOLTA], 12),  # no wheel for CUDA 13 has code for it
        ((535, 104, 5), [], 12),
    ],
)
def test_the_newest_cuda_that_runs(driver, capabilities, cuda):
    assert choose(driver, capabilities).cuda == cuda


@pytest.mark.parametrize(
    ("driver", "capabilities", "words"),
    [
        ((470, 82, 1), [AMPERE], ["driver 470.82.01", "at least 580", "at least 525"]),
        ((570, 124, 6), [BLACKWELL], ["capability 10.0 (at most 9.0)"]),
        ((580, 159, 4), [VOLTA, BLACKWELL], ["capability 7.0 (at least 7.5)", "capability 10.0 (at most 9.0)"]),
    ],
)
def test_what_no_build_runs_is_refused(driver, capabilities, words):
    with pytest.raises(UserError) as error:
        choose(driver, capabilities)
    for word in [*words, "Update the driver to 580"]:
        assert word in str(error.value)
    assert error.value.exit_code == 1


EXTENSION = "Transformer Engine's extension for torch"


def planned(build, *, has_cxx=True):
    return {step.what: step for step in steps(build, has_cxx=has_cxx)}


@pytest.mark.parametrize("build", BUILDS)
def test_every_package_is_of_the_same_cuda(build):
    plan = planned(build)
    assert plan[f"DALI for CUDA {build.cuda}"].pip == (f"nvidia-dali-cuda{build.cuda}0>=2.4",)
    core = f"transformer-engine-cu{build.cuda}==2.20.2"
    assert plan["Transformer Engine 2.20.2"].pip == ("transformer-engine==2.20.2", core)
    assert build.headers in plan["what the extension is built with"].pip
    assert not any(step.lacking for step in plan.values())


def test_only_the_extension_is_compiled_and_last_with_the_headers_of_torchs_packages():
    *others, last = steps(CUDA_13, has_cxx=True)
    assert last.what == EXTENSION
    assert "--no-build-isolation" in last.pip
    assert last.environment["NVTE_BUILD_USE_NVIDIA_WHEELS"] == "1"
    assert [step.builds for step in (*others, last)] == [False] * len(others) + [True]


@pytest.mark.parametrize("build", BUILDS)
def test_what_cannot_be_built_is_said_and_the_rest_is_installed(build):
    plan = planned(build, has_cxx=False)
    assert [name for name, step in plan.items() if step.lacking] == [EXTENSION]
    for word in ("no C++ compiler", "apt-get install g++", "slurm/container/README.md"):
        assert word in plan[EXTENSION].lacking


def test_pins_change_torch_alone_and_only_for_an_older_driver():
    assert CUDA_13.pins == ""
    assert CUDA_12.pins == "--extra-index-url https://download.pytorch.org/whl/cu126\ntorch==2.14.0+cu126\n"


def test_the_plan_is_within_the_extras_of_the_project():
    """Versions that pyproject.toml allows: the extra `gpu` and the container use those."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert CUDA_13.dali in extras["dali"]
    assert "nvidia-ml-py>=13" in extras["gpu"]
    assert planned(CUDA_13)["queries of GPUs"].pip == ("nvidia-ml-py>=13",)
