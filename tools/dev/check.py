"""``mq test``: every check that this machine can run, the quick ones first; pytest's closing line is the last."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.cli import Parser, run_program

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Check:
    """A program that must end with 0.

    Args:
        name: what it checks.
        command: arguments after ``python -m``, or a whole command line.
        module: whether ``command`` is a Python module.
    """

    name: str
    command: tuple[str, ...]
    module: bool = True

    def run(self) -> bool:
        """Runs it and shows what it printed if it fails."""
        started = time.monotonic()
        command = [sys.executable, "-m", *self.command] if self.module else list(self.command)
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        passed = done.returncode == 0
        print(f"{'ok    ' if passed else 'FAILED'}  {self.name}, {time.monotonic() - started:.1f} s", flush=True)
        if not passed:
            print(done.stdout + done.stderr, flush=True)
        return passed


CHECKS = (
    Check("formatting (ruff format)", ("ruff", "format", "--check", ".")),
    Check("lint (ruff)", ("ruff", "check", ".")),
    Check("mq parses (bash -n)", ("bash", "-n", "mq"), module=False),
    Check(".ci/run parses (bash -n)", ("bash", "-n", ".ci/run"), module=False),
    Check("types (mypy, strict)", ("mypy",)),
    Check(
        "import layers (import-linter)", (str(Path(sys.executable).parent / "lint-imports"), "--no-cache"), module=False
    ),
)


# Debian's packages that tests run against; .ci/run installs them while the environment is being made.
DEBIAN_PACKAGES = _ROOT / "tests" / "debian_packages.txt"


def install_debian_packages() -> None:
    """Installs what is missing, where this process may; elsewhere the tests say what they did without."""
    wanted = DEBIAN_PACKAGES.read_text().split()
    if os.geteuid() != 0 or shutil.which("apt-get") is None or _are_installed(wanted):
        return
    print(f"installing {', '.join(wanted)} (apt-get)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # .ci/run may be installing them at this moment.
    install = ["apt-get", "install", "-y", "-q", "-o", "DPkg::Lock::Timeout=600", *wanted]
    for command in (install, ["apt-get", "update", "-q"], install):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if command is install and done.returncode == 0:
            return
    print(f"{' '.join(install)} failed:\n{done.stderr}", flush=True)


def _are_installed(packages: Sequence[str]) -> bool:
    """Whether all are installed and configured; dpkg also knows packages that are unpacked, or removed."""
    command = ["dpkg-query", "-W", "-f=${db:Status-Abbrev}\n", *packages]
    states = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return states == ["ii"] * len(packages)


# What a shell may have set and tests must not: modules compiled anew by each of some hundred processes.
_NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")


def test_environment(*, thorough: bool) -> dict[str, str]:
    """The environment of pytest: one thread a process, and the counts of its tier."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    tier = {"MQ_TEST_TIER": "thorough" if thorough else "quick"}
    return {**kept, **tier, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}


def main(arguments: Sequence[str]) -> int:
    """Runs the checks, then pytest; 1 if any failed."""
    parser = Parser(
        "mq test",
        description="Runs every check that this machine can run: formatting, lint, types, import layers, then "
        "the tests. What it cannot run (no GPU, no privileges) pytest names with its reason. As root on Debian it "
        "installs what the tests run against: Slurm, munge, MariaDB, shellcheck, Chromium.",
        examples=[
            "mq test",
            "mq test --thorough",
            "mq test tests/data",
            "mq test -k resume -x -n 0",
            "mq test --only-static",
        ],
    )
    parser.add_argument("--only-static", action="store_true", help="everything but the tests")
    parser.add_argument(
        "--thorough", action="store_true", help="large counts: every layout of every model, more kills and mutations"
    )
    options, pytest_arguments = parser.parse_known_args(arguments)
    failed = [check.name for check in CHECKS if not check.run()]
    if options.only_static:
        return 1 if failed else 0
    if failed:
        print(f"FAILED before the tests: {', '.join(failed)}", flush=True)
    install_debian_packages()
    # Several processes, unless the command says how many: tests.schedule.
    spread = [] if {"-n", "--pdb"} & set(pytest_arguments) else ["-n", "auto"]
    command = [sys.executable, "-m", "pytest", *spread, *pytest_arguments]
    environment = test_environment(thorough=options.thorough)
    tests = subprocess.run(command, cwd=_ROOT, env=environment, check=False)
    return tests.returncode or (1 if failed else 0)


if __name__ == "__main__":
    run_program(main)
