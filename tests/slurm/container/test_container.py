"""The recipe of the container, without docker: what it copies and installs, and that NVIDIA's packages stay."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from launch.cluster import read
from tests.conftest import ROOT

FOLDER = ROOT / "slurm" / "container"
README = (FOLDER / "README.md").read_text()
NVIDIA_TORCH = "2.14.0a0+b2c75dd062.nv26.9"


def instructions() -> list[list[str]]:
    """The Dockerfile's lines as words; a line that docker would not take ends the test."""
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    lines = [shlex.split(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {words[0] for words in lines} <= {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR"}
    return lines


def test_the_image_is_pinned():
    arguments = dict(words[1].split("=") for words in instructions() if words[0] == "ARG")
    assert re.fullmatch(r"\d\d\.\d\d-py3", arguments["TAG"])
    assert ["FROM", "nvcr.io/nvidia/pytorch:${TAG}"] in instructions()
    assert f"nvidia/pytorch:{arguments['TAG']}" in README
    assert f"TAG={arguments['TAG']}" in README


def test_what_is_copied_is_there_and_in_the_build_context():
    copied = [path for words in instructions() if words[0] == "COPY" for path in words[1:-1]]
    assert copied
    patterns = [line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"]
    for path in copied:
        assert (ROOT / path).is_file(), path
        # As docker does: the last pattern that matches decides.
        kept = [line.startswith("!") for line in patterns if fnmatch.fnmatch(path, line.removeprefix("!"))]
        assert kept[-1:] == [True], f"{path} is not in the build context"


def test_what_runs_was_copied():
    (target,) = (words[-1] for words in instructions() if words[0] == "COPY")
    copied = {target + Path(path).name for words in instructions() if words[0] == "COPY" for path in words[1:-1]}
    (run,) = (words[1:] for words in instructions() if words[0] == "RUN")
    assert run[0] in copied
    extras = next(words[1] for words in instructions() if words[1].startswith("EXTRAS=")).split("=")[1].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])


def test_the_cluster_file_of_the_readme_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    cluster = read(yaml.safe_load(block), origin="README.md")
    assert cluster.container == "pyxis"
    assert cluster.container_image.endswith(".sqsh")


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """An empty package."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Stands in for NVIDIA's image: an environment with its torch, and an index with a newer one."""
    root = tmp_path_factory.mktemp("image")
    theirs, index = root / "theirs", root / "index"
    for folder in (theirs, index, root / "recipe"):
        folder.mkdir()
    wheel(theirs, "torch", NVIDIA_TORCH)
    wheel(theirs, "transformer_engine", "2.19.0", requires=("torch",))
    wheel(theirs, "PyYAML", "6.0.2")
    wheel(index, "torch", "2.15.0")
    wheel(index, "transformer_engine", "2.20.2", requires=("torch",))
    wheel(index, "PyYAML", "6.0.3")
    wheel(index, "megatron_core", "0.19.2", requires=("torch>=2.6", "packaging"))
    wheel(index, "megatron_core", "0.19.9", requires=("torch>=2.6", "packaging"))
    wheel(index, "packaging", "26.3")
    wheel(index, "transformers", "5.23.0")
    wheel(index, "needs_newer_torch", "1.0", requires=("torch>=2.15",))
    subprocess.run([sys.executable, "-m", "venv", root / "env"], check=True)
    shutil.copytree(root / "env", root / "bare", symlinks=True)
    pip = [root / "env/bin/python", "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, *theirs.iterdir()], check=True)
    shutil.copy(FOLDER / "add_packages.sh", root / "recipe")
    (root / "recipe" / "constraints.txt").write_text(
        "torch==2.15.0\nPyYAML==6.0.3\nmegatron-core==0.19.2\ntransformers==5.23.0\npackaging==26.3\n"
    )
    return root


def add_packages(image: Path, requirements: list[str], *extras: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in the image, without a network."""
    text = f"[project]\ndependencies = {requirements}\n[project.optional-dependencies]\nhf = ['transformers>=4.57']\n"
    (image / "recipe" / "pyproject.toml").write_text(text)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(image / "index"),
        # As NVIDIA's images have it: pins of everything, which would forbid what pyproject.toml asks for.
        "PIP_CONSTRAINT": str(image / "theirs.txt"),
    }
    (image / "theirs.txt").write_text("PyYAML==5.0\n")
    command = [image / "recipe/add_packages.sh", image / "env/bin/python", *extras]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def versions(image: Path) -> dict[str, str]:
    """What the environment has."""
    command = [image / "env/bin/python", "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("==") for line in listed.splitlines())


def test_packages_are_added_and_nvidias_stay(image):
    before = versions(image)
    done = add_packages(image, ["torch>=2.11", "megatron-core>=0.19,<0.20", "PyYAML>=6"], "hf")
    assert done.returncode == 0, done.stderr
    after = versions(image)
    assert before.items() <= after.items()
    assert after["torch"] == NVIDIA_TORCH
    added = {name: after[name] for name in after.keys() - before.keys()}
    assert added == {"megatron_core": "0.19.2", "packaging": "26.3", "transformers": "5.23.0"}
    assert "added 3 packages; kept torch==" in done.stdout


def test_a_package_that_is_too_old_is_renewed(image):
    assert add_packages(image, ["PyYAML>=6.0.3"]).returncode == 0
    assert versions(image)["PyYAML"] == "6.0.3"


def test_an_image_whose_torch_is_too_old_is_refused(image):
    done = add_packages(image, ["torch>=2.15"])
    assert done.returncode != 0
    assert NVIDIA_TORCH in done.stdout + done.stderr
    assert versions(image)["torch"] == NVIDIA_TORCH


def test_a_requirement_that_would_replace_torch_is_refused(image):
    assert add_packages(image, ["needs_newer_torch"]).returncode != 0
    assert versions(image)["torch"] == NVIDIA_TORCH


def test_a_replaced_torch_is_noticed(image, tmp_path):
    """Where pip does not hold to the constraints the last comparison still fails."""
    copy = tmp_path / "image"
    shutil.copytree(image, copy, symlinks=True)
    text = (copy / "recipe/add_packages.sh").read_text()
    assert '-c "$work/constraints"' in text
    (copy / "recipe/add_packages.sh").write_text(text.replace('-c "$work/constraints"', ""))
    done = add_packages(copy, ["torch>=2.15"])
    assert done.returncode == 1
    assert "compiled for the image and have been replaced" in done.stderr


def test_an_unknown_extra_is_named(image):
    done = add_packages(image, ["torch>=2.11"], "gpus")
    assert done.returncode == 1
    assert "gpus is not an extra of pyproject.toml: hf" in done.stderr


def test_an_image_without_torch_is_refused(image):
    command = [image / "recipe/add_packages.sh", image / "bare/bin/python"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "has no torch" in done.stderr
