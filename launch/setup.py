"""``mq setup``: the environment of this checkout, and with ``--gpu`` what belongs to the machine's NVIDIA driver.

`mq` starts it with a plain Python, because the environment need not exist yet: it imports the standard library alone.
"""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch.fp8_proof import prove
from launch.gpu_packages import BUILDS, LEFT_OUT, CudaBuild, Step, choose, steps
from launch.installation import Places, carry_out
from launch.nvidia_driver import Driver, find, parse_version
from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import EXIT_FAILURE, ConfigError, Problem, UserError

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str]) -> int:
    """Plans, prints the plan and carries it out; 1 if anything of it failed."""
    parser = Parser(
        "mq setup",
        description="Creates the environment of this checkout, which any program does on first use. With --gpu it adds "
        "what belongs to the NVIDIA driver: the CUDA build of torch, Transformer Engine, DALI. Then it proves the "
        "result by an FP8 GEMM. Ends with 0 if all is there, 1 if something failed.",
        examples=[
            "mq setup",
            "mq setup --gpu --dry-run",
            "srun -N1 --gpus=1 mq setup --gpu     from a login node",
            "mq setup --gpu --driver 570.124.06   on a machine without a GPU, for nodes with this driver",
        ],
    )
    parser.add_argument("--gpu", action="store_true", help="also the packages for this machine's NVIDIA driver")
    parser.add_argument("--driver", metavar="VERSION", help="plan for this driver, not for that of this machine")
    parser.add_argument("--dry-run", action="store_true", help="print what would be installed; change nothing")
    parser.add_argument("--json", action="store_true", help="print it as JSON; requires --dry-run")
    options = parser.parse_args(arguments)
    if options.driver and not options.gpu:
        raise ConfigError(Problem("--driver", options.driver, "requires --gpu."))
    if options.json and not options.dry_run:
        raise ConfigError(Problem("--json", None, "requires --dry-run."))
    places = Places(_ROOT, Path(os.environ.get("MQ_VENV") or _ROOT / ".venv"))
    driver = _driver(options.driver) if options.gpu else None
    build = choose(driver.version, _capabilities(driver)) if driver else None
    planned = list(steps(build, has_cxx=_has_cxx())) if build else []
    if options.json:
        print(json.dumps(_as_json(places, driver, build, planned), indent=2))
    else:
        print("\n".join(_as_text(places, driver, build, planned)), flush=True)
    if options.dry_run:
        return 0
    failed = carry_out(build, planned, places)
    if build and not failed and not options.driver:
        proof = prove(str(places.python))
        print(f"FP8 GEMM: {proof.found}" + (f"\n  -> {proof.fix}" if proof.fix else ""))
        failed = [] if proof.state != "wrong" else ["FP8 GEMM"]
    print(f"failed: {', '.join(failed)}" if failed else "all is there; `mq doctor` shows it")
    return EXIT_FAILURE if failed else 0


def _driver(given: str | None) -> Driver:
    """The driver that is planned for.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        version = parse_version(given)
        if version is None:
            raise ConfigError(Problem("--driver", given, "is not a version of a driver, such as 570.124.06."))
        return Driver(version, ())
    driver = find()
    if driver is None:
        raise UserError(
            "no NVIDIA driver on this machine (neither nvidia-smi nor /proc/driver/nvidia/version); nothing was "
            f"changed. Install NVIDIA's driver {BUILDS[0].oldest_driver} or newer and reboot, or run this on a GPU "
            "node, or name the driver of the nodes with --driver. Without a GPU `mq setup` is enough."
        )
    return driver


def _capabilities(driver: Driver) -> list[tuple[int, int]]:
    return [gpu.capability for gpu in driver.gpus if gpu.capability is not None]


def _has_cxx() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++"))


def _as_text(places: Places, driver: Driver | None, build: CudaBuild | None, planned: Sequence[Step]) -> list[str]:
    lines = [f"environment: {places.venv}, Python {platform.python_version()}, packages of constraints.txt"]
    if driver is None or build is None:
        return lines
    names = sorted({gpu.name for gpu in driver.gpus})
    lines.insert(0, f"driver {driver}: {len(driver.gpus)} x {', '.join(names)}" if names else f"driver {driver}")
    lines.insert(1, f"CUDA {build.cuda}: the newest that this driver and these GPUs run")
    lines += [f"  {line}" for line in build.pins.splitlines()]
    for step in planned:
        if step.lacking:
            lines.append(f"CANNOT: {step.what}: {step.lacking}")
        else:
            lines.append(f"{step.what}: pip install {' '.join(step.pip)}" + (" (compiles)" if step.builds else ""))
    return lines + [f"left out: {name}: {why}" for name, why in LEFT_OUT]


def _as_json(
    places: Places, driver: Driver | None, build: CudaBuild | None, planned: Sequence[Step]
) -> dict[str, object]:
    return {
        "environment": str(places.venv),
        "python": platform.python_version(),
        "driver": str(driver) if driver else None,
        "cuda": build.cuda if build else None,
        "pins": build.pins.splitlines() if build else [],
        "steps": [asdict(step) for step in planned],
    }


if __name__ == "__main__":
    run_program(main)
