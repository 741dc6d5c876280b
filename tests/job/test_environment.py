"""A run is not continued with other packages than it was submitted with."""

import errno
import json
import os
import sys

import pytest

from megatron_qwen import packages
from megatron_qwen.errors import EXIT_CONFIG
from megatron_qwen.job import environment
from megatron_qwen.job.environment import EnvironmentChangedError, changed, record, require_unchanged
from megatron_qwen.job.settings import JobSettings

SETTINGS = JobSettings(scheduler="slurm", signal_delay_s=10, python=sys.executable)


@pytest.fixture
def run_dir(tmp_path):
    record(tmp_path, SETTINGS)
    return tmp_path


def as_of(run_dir, **versions):
    """The run was submitted with these versions."""
    path = run_dir / environment.NAME
    content = json.loads(path.read_text())
    for name, version in versions.items():
        content["packages"][name]["version"] = version
    path.write_text(json.dumps(content))


def test_the_same_packages(run_dir):
    assert changed(run_dir, SETTINGS) == []
    require_unchanged(run_dir, SETTINGS)


def test_other_packages_are_named_with_the_way_out(run_dir):
    as_of(run_dir, numpy="1.0", torch="2.0")
    with pytest.raises(EnvironmentChangedError) as caught:
        require_unchanged(run_dir, SETTINGS, wait=False)
    said = caught.value.render()
    assert caught.value.exit_code == EXIT_CONFIG
    assert said.startswith(f"environment changed: environment = {sys.executable}: has other packages")
    assert "numpy 1.0 -> " in said
    assert "torch 2.0 -> " in said
    assert f"mq launch requeue {run_dir} --new-code" in said


def test_a_difference_that_passes(run_dir, monkeypatch):
    """pip takes a package out before it puts the new one in."""
    looks = [["torch 2.13.0 -> absent"], ["torch 2.13.0 -> incomplete"], []]
    monkeypatch.setattr(environment, "changed", lambda *_: looks.pop(0))
    monkeypatch.setattr(environment, "_LOOK_EVERY_S", 0.01)
    require_unchanged(run_dir, SETTINGS)
    assert looks == []


def test_it_is_waited_for_longer_while_mq_installs(run_dir, monkeypatch):
    prefix = run_dir / "venv"
    (prefix / "bin").mkdir(parents=True)
    settings = JobSettings(scheduler="slurm", signal_delay_s=10, python=str(prefix / "bin" / "python"))
    monkeypatch.setattr(environment, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(environment, "_PATIENCE_S", -1.0)
    monkeypatch.setattr(environment, "changed", lambda *_: ["torch 2.13.0 -> absent"])
    with pytest.raises(EnvironmentChangedError):
        require_unchanged(run_dir, settings)
    (prefix / ".installing").touch()
    looks = [["torch 2.13.0 -> absent"]] * 3 + [[]]
    monkeypatch.setattr(environment, "changed", lambda *_: looks.pop(0))
    require_unchanged(run_dir, settings)
    monkeypatch.setattr(environment, "changed", lambda *_: ["torch 2.13.0 -> absent"])
    monkeypatch.setattr(environment.time, "sleep", lambda _: pytest.fail("it has no time"))
    require_unchanged(run_dir, settings, stopped=lambda: True)  # the attempt then ends as requeued


def test_a_run_of_an_earlier_version_gets_its_record(tmp_path):
    require_unchanged(tmp_path, SETTINGS)
    assert "torch" in json.loads((tmp_path / environment.NAME).read_text())["packages"]
    (tmp_path / environment.NAME).write_text("[")
    assert changed(tmp_path, SETTINGS) == [], "a damaged record ends no run"


def test_another_interpreter_is_asked(run_dir, tmp_path):
    other = tmp_path / "python"
    answer = json.loads((run_dir / environment.NAME).read_text())
    answer["packages"]["numpy"]["version"] = "9.9"
    other.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
    other.chmod(0o755)
    settings = JobSettings(scheduler="slurm", signal_delay_s=10, python=str(other))
    assert [line for line in changed(run_dir, settings) if line.endswith("-> 9.9")]
    other.write_text("#!/bin/sh\nexit 1\n")
    assert changed(run_dir, settings) == [], "one that does not answer cannot be compared; the start will tell"


def test_the_image_of_a_container(tmp_path):
    image = tmp_path / "image.sqsh"
    image.write_text("one")
    for more in (
        {"srun_arguments": (f"--container-image={image}",)},
        {"rank_prefix": ("apptainer", "exec", str(image))},
    ):
        settings = JobSettings(scheduler="slurm", signal_delay_s=10, python="python3", **more)
        record(tmp_path, settings)
        as_of(tmp_path, torch="2.0")  # of the controller's interpreter, with which no rank computes
        assert changed(tmp_path, settings) == []
        image.write_text(image.read_text() + "more")
        assert changed(tmp_path, settings) == ["the container image is another file than at submission"]


def test_a_package_that_the_present_code_no_longer_asks_for(run_dir, monkeypatch, tmp_path):
    """A run is compared by the packages that were recorded for it, whatever the checkout's pyproject.toml has since."""
    content = json.loads((run_dir / environment.NAME).read_text())
    assert "numpy" in content["packages"]
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["psutil"]\n')
    monkeypatch.setattr(packages, "_PROJECT", project)
    assert changed(run_dir, SETTINGS) == []
    content["packages"]["numpy"]["version"] = "1.0"
    (run_dir / environment.NAME).write_text(json.dumps(content))
    (difference,) = changed(run_dir, SETTINGS)
    assert difference.startswith("numpy 1.0 -> ")


def test_a_file_system_that_fails_is_no_other_environment(run_dir, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(environment, "installed", fails)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        require_unchanged(run_dir, SETTINGS)
