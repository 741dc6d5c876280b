"""The packages of a run: which count, and what is a difference."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_qwen import packages
from megatron_qwen.packages import PythonEnvironment, differences, installed
from tests.conftest import ROOT


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Packages in a folder, for a project that wants ``torch`` and ``numpy``, and ``pytest`` for its tests."""
    project = tmp_path / "pyproject.toml"
    extras = '[project.optional-dependencies]\ntest = ["pytest>=9"]\nhf = ["transformers[torch]>=4"]\n'
    project.write_text(f'[project]\ndependencies = ["torch>=2", "NumPy>=2 ; python_version > \'3\'"]\n{extras}')
    monkeypatch.setattr(packages, "_PROJECT", project)
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "torch", "2.13.0", needs=["typing_extensions>=4", 'optree>=1 ; extra == "optree"'])
    install(folder, "Typing_Extensions", "4.1")
    install(folder, "optree", "1.0")
    install(folder, "numpy", "2.5.0")
    install(folder, "pytest", "9.0", needs=["pluggy"])
    install(folder, "pluggy", "1.0")
    install(folder, "megatron_qwen", "0.1.0")
    return folder


def install(folder, name, version, *, needs=()):
    path = folder / f"{name}-{version}.dist-info"
    path.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {need}" for need in needs)]
    path.joinpath("METADATA").write_text("\n".join([*lines, "", "Requires-Dist: of the description"]))
    rows = [
        f"{name}/__init__.py,sha256=a,10",
        f"{name}/__pycache__/__init__.cpython-312.pyc,,",
        f"../../../bin/{name},sha256=of-the-path,10",
        f"{path.name}/INSTALLER,sha256=pip,4",
        f"{path.name}/RECORD,,",
    ]
    path.joinpath("RECORD").write_text("\n".join(rows))
    return path


def at(folder) -> PythonEnvironment:
    return installed([str(folder.parent / "absent"), str(folder)])


def test_what_the_project_needs_counts_and_what_these_need(site):
    assert at(site).versions() == {"numpy": "2.5.0", "torch": "2.13.0", "typing-extensions": "4.1"}
    install(site, "transformers", "5.0")
    install(site, "transformer_engine_torch", "2.8")
    install(site, "nvidia_nccl_cu13", "2.30")
    for tool in ("nvidia_ml_py", "nvidia_modelopt", "nvidia_nsight_systems"):
        install(site, tool, "1.0")
    assert {*at(site).packages} - {"numpy", "torch", "typing-extensions"} == {
        "transformers", "transformer-engine-torch", "nvidia-nccl-cu13",
    }  # fmt: skip


def test_the_first_folder_counts_as_for_an_import(site, tmp_path):
    other = tmp_path / "first"
    other.mkdir()
    install(other, "numpy", "2.9")
    assert installed([str(other), str(site)]).versions()["numpy"] == "2.9"


def test_differences(site):
    before = at(site)
    assert differences(before, at(site)) == []
    assert differences(before, replace(before, interpreter="/other/bin/python")) == []
    (site / "torch-2.13.0.dist-info").rename(site / "torch-2.14.0.dist-info")
    (site / "numpy-2.5.0.dist-info" / "RECORD").write_text("numpy/__init__.py,sha256=b,10\n")
    (site / "Typing_Extensions-4.1.dist-info").rename(site / "~yping_Extensions-4.1.dist-info")  # as pip sets aside
    now = replace(at(site), python="3.99.0")
    assert differences(before, now) == [
        f"Python {before.python} -> 3.99.0",
        "numpy 2.5.0: other files under the same version",
        "torch 2.13.0 -> 2.14.0",
        "typing-extensions 4.1 -> absent",
    ]


def test_a_new_package_is_a_difference_only_if_a_run_would_use_it(site):
    before = at(site)
    install(site, "transformers", "5.0")
    install(site, "hypothesis", "6.0")
    assert differences(before, at(site)) == []
    install(site, "transformer_engine", "2.8")
    install(site, "apex", "0.1")
    assert differences(before, at(site)) == ["apex absent -> 0.1", "transformer-engine absent -> 2.8"]


def test_an_installation_by_another_program_or_elsewhere_is_the_same(site):
    before = at(site)
    record = site / "torch-2.13.0.dist-info" / "RECORD"
    rows = record.read_text().splitlines()
    rows = [row.replace("of-the-path", "of-another").replace("sha256=pip", "sha256=uv") for row in reversed(rows)]
    record.write_text("\n".join([*rows, "torch/__pycache__/x.cpython-312.pyc,,"]))
    assert differences(before, at(site)) == []


def test_a_package_that_is_being_installed(site):
    before = at(site)
    (site / "torch-2.13.0.dist-info" / "RECORD").unlink()
    assert differences(before, at(site)) == ["torch 2.13.0 -> incomplete"]


def test_a_list_of_files_that_cannot_be_read_is_no_installation(site):
    record = site / "torch-2.13.0.dist-info" / "RECORD"
    record.unlink()
    record.symlink_to(record)  # reading it fails with ELOOP, also for root
    with pytest.raises(OSError, match="RECORD"):
        at(site)


def test_names_that_count_in_any_case(site):
    found = installed([str(site)], also=["pluggy", "absent"]).versions()
    assert found == {**at(site).versions(), "pluggy": "1.0"}


def test_it_is_written_and_read():
    there = installed()
    assert {"torch", "numpy", "megatron-core"} <= {*there.packages}
    assert PythonEnvironment.from_dict(json.loads(json.dumps(there.as_dict()))) == there
    for wrong in ({}, {"interpreter": "x", "python": "3", "packages": {"torch": "2"}}, {"packages": []}):
        with pytest.raises(ValueError, match="no environment"):
            PythonEnvironment.from_dict(wrong)


def test_another_interpreter_tells_its_own():
    command = [sys.executable, "-P", "-m", "megatron_qwen.packages"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert PythonEnvironment.from_dict(json.loads(done.stdout)).packages == installed().packages


def test_without_the_project_file_all_count(site, monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "_PROJECT", tmp_path / "absent.toml")
    assert {*at(site).packages} == {"torch", "typing-extensions", "optree", "numpy", "pytest", "pluggy"}


def test_folders_that_a_program_adds_for_itself_do_not_count(site, monkeypatch):
    """setuptools adds those of the packages that it brings when it is imported."""
    before = installed()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert installed() == before
