"""The script `mq`, with real environments: a checkout without dependencies stands in for this one, to be quick."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiers import cases, thorough

PYPROJECT = """
[build-system]
requires = ["flit_core"]
build-backend = "flit_core.buildapi"
[project]
name = "small"
version = "1"
description = "A module without dependencies."
[project.optional-dependencies]
hf = []
docs = []
test = []
dev = []
"""
# The search for one, which goes through the shims of pyenv, is not repeated by every test.
PYTHON = Path(sys.base_prefix) / "bin" / "python3"


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A checkout with its environment, and what `mq setup` said."""
    root = make_checkout(tmp_path_factory.mktemp("ready"))
    return root, mq(root, "setup")


def make_checkout(folder: Path) -> Path:
    root = folder / "checkout"
    (root / "tools").mkdir(parents=True)
    shutil.copyfile(ROOT / "mq", root / "mq")
    (root / "mq").chmod(0o755)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "small.py").write_text("")
    (root / "constraints.txt").write_text("")
    (root / "tools" / "__init__.py").write_text("")
    (root / "tools" / "recipes.py").write_text("import sys\nprint('ours', *sys.argv[1:])\n")
    return root


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MQ_VENV", "PYTHONPATH")}
    return {**kept, "MQ_PYTHON": str(PYTHON), **more}


def mq(checkout: Path, *arguments: str, cwd: Path | None = None, script: Path | None = None, **more: str):
    return subprocess.run(
        [str(script or checkout / "mq"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment(**more),
        timeout=300,
    )


def test_lists_its_programs_without_an_environment(checkout):
    for arguments in ([], ["--help"]):
        done = mq(checkout, *arguments)
        assert done.returncode == 0
        for program in ("demo", "test", "train", "recipes", "config", "data", "convert", "generate", "report", "bench"):
            assert f"mq {program} " in done.stdout
    wrong = mq(checkout, "trian")
    assert wrong.returncode == 2
    assert "unknown program: trian" in wrong.stderr
    assert not (checkout / ".venv").exists()


def test_finds_a_python_and_sets_up_once(checkout):
    first = mq(checkout, "recipes", "a b", MQ_PYTHON="")
    assert first.stdout == "ours a b\n", first.stderr
    assert "setting up" in first.stderr
    assert "set up in" in first.stderr
    assert mq(checkout, "recipes", MQ_PYTHON="").stderr == ""


@thorough("the other set-ups stay")
def test_extras_of_one_program_stay_when_another_runs(checkout):
    (checkout / "tools" / "dev").mkdir()
    for module in ("docs", "dev/check"):
        shutil.copyfile(checkout / "tools" / "recipes.py", checkout / "tools" / f"{module}.py")
    extras, set_up = [], []
    for program in ("docs", "recipes", "test", "docs"):
        set_up.append("setting up" in mq(checkout, program).stderr)
        extras.append((checkout / ".venv" / ".ready").read_text().split()[0])
    assert set_up == [True, False, True, False]
    base = "hf,quantize,docs"
    assert extras == [base, base, f"{base},test,dev", f"{base},test,dev"]


def test_setup_alone_makes_the_environment(ready):
    checkout, done = ready
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"mq: the environment {checkout / '.venv'} is ready\n"
    assert mq(checkout, "recipes").stderr == "", "nothing was left to do"


def test_sets_up_again_when_constraints_change(ready):
    checkout, _ = ready
    (checkout / "constraints.txt").write_text("# changed\n")
    assert "setting up" in mq(checkout, "recipes").stderr
    assert mq(checkout, "recipes").stderr == ""


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_text_is_utf8_whatever_the_locale_says(locale, ready):
    checkout, _ = ready
    program = checkout / "tools" / "recipes.py"
    kept = program.read_text()
    program.write_text("import os, sys\nprint(sys.argv[1], sys.stdout.encoding, os.fsencode(sys.argv[1]))\n")
    try:
        done = mq(checkout, "recipes", "你好", LC_ALL=locale, LANG=locale, PYTHONIOENCODING="", PYTHONUTF8="0")
    finally:
        program.write_text(kept)
    assert done.stdout == f"你好 utf-8 {'你好'.encode()}\n"


def installer(checkout: Path, package: str) -> str:
    """Who installed a package."""
    (name,) = (checkout / ".venv").glob(f"lib/*/site-packages/{package}-*.dist-info/INSTALLER")
    return name.read_text().strip()


@thorough("the other set-ups use uv")
def test_installs_with_uv_by_the_settings_of_pip_and_with_pip_where_there_is_no_uv(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "onlyhere", "1.0", {"onlyhere.py": "here = True\n"})
    (checkout / "pyproject.toml").write_text(
        PYPROJECT.replace('version = "1"', 'version = "1"\ndependencies = ["onlyhere"]')
    )
    (checkout / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    assert mq(checkout, "recipes", PIP_FIND_LINKS=str(wheels)).stdout == "ours\n"
    assert installer(checkout, "onlyhere") == installer(checkout, "small") == "uv"
    # As an interrupted set-up leaves it: a package without a file, and no sign that all is ready.
    (module,) = (checkout / ".venv").glob("lib/*/site-packages/onlyhere.py")
    module.unlink()
    (checkout / ".venv/.ready").rename(checkout / ".venv/.installing")
    (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {wheels}\n")  # no section [install]
    settings = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_FIND_LINKS": ""}
    assert mq(checkout, "recipes", **settings).stdout == "ours\n"
    assert module.exists()
    assert installer(checkout, "onlyhere") == "uv"
    (checkout / "constraints.txt").write_text("uv==0.0.0.1\n")
    assert mq(checkout, "recipes", PIP_FIND_LINKS=str(wheels)).stdout == "ours\n"
    assert installer(checkout, "small") == "pip"


def make_wheel(folder: Path, name: str, version: str, modules: dict[str, str]) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in modules.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in modules))


@thorough("tests/launch/test_setup.py has the pins")
def test_pins_of_an_older_driver_replace_torch_and_its_libraries(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "torch", "1.0+cu126", {})
    (checkout / "pyproject.toml").write_text(
        PYPROJECT.replace('version = "1"', 'version = "1"\ndependencies = ["torch"]')
    )
    (checkout / "constraints.txt").write_text(
        "cuda-toolkit==13.2.2\nnvidia-nccl-cu13==2.30.7\ntorch==2.15.0\nxxhash==4.1.0\n"
    )
    pins = f"--find-links {wheels}\ntorch==1.0+cu126\n"
    (checkout / ".venv.pins").write_text(pins)
    assert mq(checkout, "recipes").stdout == "ours\n"
    assert (checkout / ".venv" / "constraints.txt").read_text() == f"{pins}xxhash==4.1.0\n"
    command = [checkout / ".venv/bin/python", "-m", "pip", "list", "--format=freeze"]
    assert "torch==1.0+cu126" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert mq(checkout, "recipes").stderr == "", "set up once"
    (checkout / ".venv.pins").write_text(pins + "# another driver\n")
    assert "setting up" in mq(checkout, "recipes").stderr


def test_runs_from_anywhere_and_through_a_link(ready, tmp_path):
    checkout, _ = ready
    theirs = tmp_path / "theirs"
    for name in ("tools", "launch"):
        (theirs / name).mkdir(parents=True)
        (theirs / name / "__init__.py").write_text("raise SystemExit('the wrong folder')\n")
    link = tmp_path / "bin" / "mq"
    link.parent.mkdir()
    link.symlink_to(checkout / "mq")
    for script in (checkout / "mq", link):
        done = mq(checkout, "recipes", cwd=theirs, script=script)
        assert (done.returncode, done.stdout) == (0, "ours\n"), done.stderr


@thorough("an interrupted set-up stays")
def test_two_at_once_make_one_environment(checkout):
    both = [
        subprocess.Popen(
            [str(checkout / "mq"), "recipes"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in both]
    assert [out for out, _ in answers] == ["ours\n", "ours\n"]
    assert sum("mq: setting up" in error for _, error in answers) == 1
    assert sum("waiting for another mq" in error for _, error in answers) == 1


@pytest.mark.parametrize("number", cases([signal.SIGKILL], [signal.SIGINT]))
def test_an_interrupted_set_up_is_never_used(number, checkout):
    process = subprocess.Popen(
        [str(checkout / "mq"), "recipes"],
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (checkout / ".venv" / "bin" / "python").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.wait()
    assert not (checkout / ".venv" / ".ready").exists()
    again = mq(checkout, "recipes")
    assert again.stdout == "ours\n", again.stderr
    assert "setting up" in again.stderr


def test_a_failed_set_up_says_so(checkout):
    (checkout / "pyproject.toml").write_text(PYPROJECT.replace('version = "1"', 'version = "not a version"'))
    done = mq(checkout, "recipes")
    assert done.returncode == 1
    assert "the set-up failed; the log is" in done.stderr
    assert not (checkout / ".venv" / ".ready").exists()


def test_a_python_that_does_not_fit_is_refused(checkout):
    (checkout / "false").write_text("#!/bin/sh\nexit 1\n")
    (checkout / "false").chmod(0o755)
    done = mq(checkout, "recipes", MQ_PYTHON=str(checkout / "false"))
    assert done.returncode == 2
    assert "is not Python 3.12 or 3.13" in done.stderr


def test_the_wheel_holds_the_library_alone(tmp_path):
    source = tmp_path / "source"
    # Building leaves folders beside the sources, so it is done on a copy.
    leave = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "demo-run*")
    shutil.copytree(ROOT, source, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"megatron_qwen"}
    assert "megatron_qwen/py.typed" in names
    assert sum(name.endswith(".py") for name in names) == len(list((source / "megatron_qwen").rglob("*.py")))


def test_what_is_no_environment_is_left_alone(checkout, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for place in (precious, precious / "thesis.tex"):
        done = mq(checkout, "recipes", MQ_VENV=str(place))
        assert done.returncode == 2, done.stderr
        assert "is not a Python environment" in done.stderr
        assert (precious / "thesis.tex").read_text() == "years of work"
