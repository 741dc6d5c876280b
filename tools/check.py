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

_ROOT = Path(__file__).resolve().parent.parent


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
    Check("shell scripts parse (bash -n)", ("bash", "-n", "mq", ".ci/run"), module=False),
    Check("types (mypy, strict)", ("mypy",)),
    Check(
        "import layers (import-linter)", (str(Path(sys.executable).parent / "lint-imports"), "--no-cache"), module=False
    ),
)


# Debian's package by a program of it: what tests run against that pip does not have.
DEBIAN_PACKAGES = {
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "shellcheck": "shellcheck",
    "chromium": "chromium",
}


def install_debian_packages() -> None:
    """Installs what is missing, where this process may; elsewhere the tests say what they did without."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [package for program, package in DEBIAN_PACKAGES.items() if shutil.which(program, path=path) is None]
    if not missing or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(missing)} (apt-get)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", *missing]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            print(f"{' '.join(command)} failed:\n{done.stderr}", flush=True)
            return


def main(arguments: Sequence[str]) -> int:
    """Runs the checks, then pytest; 1 if any failed."""
    parser = Parser(
        "mq test",
        description="Runs every check that this machine can run: formatting, lint, types, import layers, then "
        "the tests. What it cannot run (no GPU, no privileges) pytest names with its reason. As root on Debian it "
        "installs what the tests run against: Slurm, munge, MariaDB, shellcheck, Chromium.",
        examples=["mq test", "mq test tests/data", "mq test -k resume -x", "mq test --only-static"],
    )
    parser.add_argument("--only-static", action="store_true", help="everything but the tests")
    options, pytest_arguments = parser.parse_known_args(arguments)
    failed = [check.name for check in CHECKS if not check.run()]
    if options.only_static:
        return 1 if failed else 0
    if failed:
        print(f"FAILED before the tests: {', '.join(failed)}", flush=True)
    install_debian_packages()
    command = [sys.executable, "-m", "pytest", *pytest_arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    tests = subprocess.run(command, cwd=_ROOT, env=environment, check=False)
    return tests.returncode or (1 if failed else 0)


if __name__ == "__main__":
    run_program(main)
