"""From a driver to CUDA to packages."""

import tomllib
from pathlib import Path

import pytest

from launch.gpu_packages import BUILDS, Compiler, choose, steps
from megatron_qwen.errors import UserError
from tests.conftest import ROOT

SITE = Path("/env/lib/python3.12/site-packages")
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


def planned(build, **machine):
    return {step.what: step for step in steps(build, site=SITE, **machine)}


EXTENSION = "Transformer Engine's extension for torch"


def test_a_bare_machine_with_cuda_13_gets_its_compiler_from_pypi():
    plan = planned(CUDA_13, compiler=None, has_cxx=True)
    assert plan["nvcc of CUDA 13"].pip == ("cuda-toolkit[nvcc,crt,nvvm]",)
    assert list(plan).index("nvcc of CUDA 13") < list(plan).index(EXTENSION)
    assert plan[EXTENSION].environment["CUDA_HOME"] == str(SITE / "nvidia" / "cu13")
    assert plan["DALI for CUDA 13"].pip == ("nvidia-dali-cuda130>=2.4",)
    assert any("core_cu13" in word for step in plan.values() for word in step.pip)
    assert not any(step.lacking for step in plan.values())


@pytest.mark.parametrize("build", BUILDS)
def test_a_toolkit_of_the_right_version_is_used(build):
    plan = planned(build, compiler=Compiler("/usr/local/cuda", (build.cuda, 0)), has_cxx=True)
    assert plan[EXTENSION].environment["CUDA_HOME"] == "/usr/local/cuda"
    assert not any(name.startswith("nvcc") for name in plan)
    assert not any(step.lacking for step in plan.values())


def test_a_toolkit_of_another_version_is_not_used():
    plan = planned(CUDA_13, compiler=Compiler("/usr/local/cuda", (12, 6)), has_cxx=True)
    assert plan[EXTENSION].environment["CUDA_HOME"] == str(SITE / "nvidia" / "cu13")


@pytest.mark.parametrize(
    ("compiler", "has_cxx", "word"),
    [
        (None, True, "and there is none"),
        (Compiler("/opt/cuda", (13, 0)), True, "/opt/cuda has 13.0"),
        (Compiler("/opt/cuda", (12, 6)), False, "install g++"),
    ],
)
def test_what_cannot_be_built_is_said_and_the_rest_is_installed(compiler, has_cxx, word):
    plan = planned(CUDA_12, compiler=compiler, has_cxx=has_cxx)
    assert word in plan[EXTENSION].lacking
    assert "slurm/container/README.md" in plan[EXTENSION].lacking
    assert [name for name, step in plan.items() if step.lacking] == [EXTENSION]
    assert plan["DALI for CUDA 12"].pip == ("nvidia-dali-cuda120>=2.4",)


def test_pins_change_torch_alone_and_only_for_an_older_driver():
    assert CUDA_13.pins == ""
    assert CUDA_12.pins == "--extra-index-url https://download.pytorch.org/whl/cu126\ntorch==2.14.0+cu126\n"


def test_the_plan_is_within_the_extras_of_the_project():
    """Versions that pyproject.toml allows: the extra `gpu` and the container use those."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert CUDA_13.dali in extras["dali"]
    assert "nvidia-ml-py>=13" in extras["gpu"]
    assert planned(CUDA_13, compiler=None, has_cxx=True)["queries of GPUs"].pip == ("nvidia-ml-py>=13",)
