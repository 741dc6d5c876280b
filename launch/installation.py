"""The environment of `mq` as files and calls of pip: what ``mq setup`` planned is carried out here."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.gpu_packages import CudaBuild, Step
from megatron_qwen.files import atomic_write, exclusive_lock

_SHOWN_LINES = 15


@dataclass(frozen=True)
class Places:
    """Where things are.

    Args:
        root: the checkout.
        venv: the environment of `mq`.
    """

    root: Path
    venv: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.venv / "bin" / "python"

    @property
    def site(self) -> Path:
        """Its packages."""
        return self.venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    @property
    def pins(self) -> Path:
        """What `mq` adds to constraints.txt for this environment. It is beside it, as its lock is."""
        return self.venv.with_name(self.venv.name + ".pins")

    @property
    def lock(self) -> Path:
        """Held while the environment is changed; `mq` itself has another."""
        return self.venv.with_name(self.venv.name + ".setup.lock")

    @property
    def built_for(self) -> Path:
        """Names the torch for which the extension was compiled: it is valid for that one alone."""
        return self.venv / "extension-built-for"

    @property
    def log(self) -> Path:
        """What pip said."""
        return self.venv / "setup-gpu.log"


def carry_out(build: CudaBuild | None, planned: Sequence[Step], places: Places) -> list[str]:
    """Sets up the environment and takes every step that can be taken; returns what failed or could not be tried.

    Args:
        build: whose torch the environment gets; None leaves the choice of an earlier ``--gpu`` as it is.
        planned: the steps.
        places: where.
    """
    # Nodes that share a file system may all be told to set up the same environment.
    places.lock.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(places.lock):
        return _carried_out(build, planned, places)


def _carried_out(build: CudaBuild | None, planned: Sequence[Step], places: Places) -> list[str]:
    before = places.pins.read_text() if places.pins.is_file() else None
    if build is not None:
        _write_pins(places, build.pins or None)
    plain = {**os.environ, "MQ_VENV": str(places.venv)}
    if subprocess.run([str(places.root / "mq"), "setup"], env=plain, check=False).returncode:
        if build is not None:
            _write_pins(places, before)
        return ["environment"]
    failed = []
    places.log.write_text("")
    for step in planned:
        if step.lacking:
            print(f"CANNOT: {step.what}: {step.lacking}", flush=True)
        elif _install(step, places):
            print(f"ok: {step.what}", flush=True)
            continue
        failed.append(step.what)
    return failed


def _write_pins(places: Places, content: str | None) -> None:
    if content is None:
        places.pins.unlink(missing_ok=True)
    else:
        places.pins.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(places.pins, content)


def _install(step: Step, places: Places) -> bool:
    """Calls pip with the pins of the environment, so that torch stays the one that was chosen."""
    print(f"{step.what} ...", flush=True)
    command = [*step.pip, "-c", str(places.venv / "constraints.txt")]
    if not step.builds:
        return _pip("install", command, step, places, os.environ)
    torch = next((path.name for path in places.site.glob("torch-*.dist-info")), "no torch")
    if not places.built_for.is_file() or places.built_for.read_text() != torch:
        places.built_for.unlink(missing_ok=True)
        names = [word.split("==")[0] for word in step.pip if not word.startswith("-")]
        _pip("uninstall", ["-y", *names], step, places, os.environ)
    # ninja is in the environment; pip's cache does not know for which torch a wheel was compiled.
    path = os.pathsep.join([str(places.venv / "bin"), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, **step.environment, "PATH": path}
    if not _pip("install", ["--no-cache-dir", *command], step, places, environment):
        return False
    atomic_write(places.built_for, torch)
    return True


def _pip(verb: str, arguments: Sequence[str], step: Step, places: Places, environment: Mapping[str, str]) -> bool:
    command = [str(places.python), "-m", "pip", verb, "--disable-pip-version-check", *arguments]
    with places.log.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        said = places.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        print("\n".join([*said, f"FAILED: {step.what}; the log is {places.log}"]), flush=True)
    return code == 0
