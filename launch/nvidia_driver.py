"""The NVIDIA driver of this machine and its GPUs, as nvidia-smi and the kernel module report them."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.errors import Problem, UserError

_MODULE = Path("/proc/driver/nvidia/version")
_TIMEOUT_S = 60.0
# Drivers before 510 do not know compute_cap, and refuse the whole query.
_QUERIES = ("name,driver_version,compute_cap", "name,driver_version")
_VERSION = re.compile(r"\b(\d{3,}(?:\.\d+){1,2})\b")


class DriverError(UserError):
    """The driver is installed and does not work; says what it answered (exit 1)."""

    kind = "NVIDIA driver"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: as nvidia-smi prints it.
        capability: compute capability, such as (9, 0); None where the driver does not tell.
    """

    name: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Driver:
    """An installed driver.

    Args:
        version: such as (570, 124, 6).
        gpus: what it drives; empty where only the kernel module was found (a container without nvidia-smi).
    """

    version: tuple[int, ...]
    gpus: tuple[Gpu, ...]

    def __str__(self) -> str:
        return shown(self.version)


def shown(version: tuple[int, ...]) -> str:
    """A version as NVIDIA writes it: 570.124.06; the third number has two digits."""
    return ".".join(str(part) if place < 2 else f"{part:02d}" for place, part in enumerate(version))


def find(module: Path = _MODULE) -> Driver | None:
    """The driver of this machine; None where there is none.

    Args:
        module: the kernel module's own file.

    Raises:
        DriverError: nvidia-smi is installed and fails.
    """
    if shutil.which("nvidia-smi") is None:
        version = parse_module(module.read_text()) if module.is_file() else None
        return Driver(version, ()) if version else None
    answer = ""
    for fields in _QUERIES:
        code, answer = _ask(fields)
        driver = parse_query(answer) if code == 0 else None
        if driver is not None:
            return driver
    first = next((line for line in answer.splitlines() if line.strip()), "no output")
    fix = (
        "fails: load the module (modprobe nvidia), reboot after an update of the driver, or start the container with "
        "its GPUs (docker --gpus all); nvidia-smi -L must list them."
    )
    raise DriverError(Problem("nvidia-smi", first.strip(), fix))


def _ask(fields: str) -> tuple[int, str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{error}."
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def parse_query(text: str) -> Driver | None:
    """The answer of ``nvidia-smi --query-gpu=name,driver_version[,compute_cap] --format=csv,noheader``."""
    gpus, version = [], None
    for line in text.splitlines():
        name, *values = (part.strip() for part in line.split(","))
        version = parse_version(values[0]) if values else None
        if version is None:
            continue  # a warning, or a GPU that does not answer
        gpus.append(Gpu(name, _capability(values[1]) if len(values) > 1 else None))
    return Driver(version, tuple(gpus)) if version else None


def _capability(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def parse_module(text: str) -> tuple[int, ...] | None:
    """The version in ``/proc/driver/nvidia/version``, whose first line begins with ``NVRM version:``."""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    return parse_version(line)


def parse_version(text: str) -> tuple[int, ...] | None:
    """The first version of a driver in a text; None where there is none."""
    found = _VERSION.search(text)
    return tuple(map(int, found[1].split("."))) if found else None
