"""``mq doctor``: what this machine and its cluster have and lack, with the way out for each."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from launch import nvidia_driver
from launch.fp8_proof import prove
from megatron_qwen import slurm
from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import EXIT_FAILURE, UserError
from megatron_qwen.models.apex_kernels import foreign_apex_is_here, nvidia_apex_is_here

_GIB = 2**30
_SHARED_MEMORY_GIB = 8  # Docker gives 64 MiB unless it is told otherwise; chosen by hand
State = Literal["ok", "lacks", "note"]


@dataclass(frozen=True)
class Examined:
    """One thing that was looked at.

    Args:
        what: its name.
        state: ok; lacks, for what runs need here; note, for what some runs want.
        found: what is there.
        fix: what to do about it; empty where there is nothing to do.
    """

    what: str
    state: State
    found: str
    fix: str = ""


def examine() -> list[Examined]:
    """Looks at everything, the machine first."""
    parts: tuple[Callable[[], Iterator[Examined]], ...] = (
        _python,
        _packages,
        _machine,
        _gpus,
        _network,
        _slurm,
        _containers,
    )
    return [item for look in parts for item in look()]


def _python() -> Iterator[Examined]:
    number = platform.python_version_tuple()[:2]
    right = number in (("3", "12"), ("3", "13"))
    yield Examined(
        "python", "ok" if right else "lacks", platform.python_version(), "" if right else "use 3.12 or 3.13."
    )


def _packages() -> Iterator[Examined]:
    for name in ("torch", "megatron-core", "submitit", "safetensors"):
        found = _version(name)
        fix = "" if found else "./mq sets up its environment on first use; remove .venv and call it again."
        yield Examined(name, "ok" if found else "lacks", found or "not installed", fix)
    engine = _version("transformer-engine")
    fix = "" if engine else "./mq setup --gpu on GPU nodes; without it the torch backend runs, without FP8."
    yield Examined("transformer-engine", "ok" if engine else "note", engine or "not installed", fix)
    if foreign_apex_is_here():
        yield Examined("apex", "note", "another project of that name", "pip uninstall apex: PyPI's is not NVIDIA's.")
    else:
        yield Examined("apex", "ok", "there" if nvidia_apex_is_here() else "not installed; its kernels are optional")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Examined]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    yield Examined("cpu, memory", "ok", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB")
    shared = shutil.disk_usage("/dev/shm").total / _GIB if Path("/dev/shm").is_dir() else 0.0
    small = shared < _SHARED_MEMORY_GIB
    fix = f"NCCL and data loaders need {_SHARED_MEMORY_GIB} GiB (container: --shm-size)." if small else ""
    yield Examined("/dev/shm", "note" if small else "ok", f"{shared:.1f} GiB", fix)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < 4096
    fix = "ulimit -n 65536 in the job's setup, or limits.conf: many ranks open many sockets." if few else ""
    yield Examined("open files", "note" if few else "ok", str(files), fix)
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    yield Examined(
        "disk here", "ok" if free > 20 else "note", f"{free:.0f} GiB free", "" if free > 20 else "make room."
    )


def _gpus() -> Iterator[Examined]:
    try:
        driver = nvidia_driver.find()
    except nvidia_driver.DriverError as error:
        (problem,) = error.problems
        yield Examined("GPUs", "lacks", f"nvidia-smi: {problem.value}", problem.fix)
        return
    if driver is None:
        fix = "runs use the CPU and gloo here; on a GPU node install the driver."
        yield Examined("GPUs", "note", "no NVIDIA driver", fix)
        yield Examined("FP8 GEMM", "note", "not tried: no GPU")
        return
    names = f"{len(driver.gpus)} x {driver.gpus[0].name}" if driver.gpus else "number unknown (no nvidia-smi)"
    yield Examined("GPUs", "ok", f"{names}, driver {driver}")
    if _version("torch") is None:
        yield Examined("FP8 GEMM", "note", "not tried: no torch")
        return
    proof = prove(sys.executable)
    state: State = "ok" if proof.state == "ok" else "lacks" if proof.state == "wrong" else "note"
    yield Examined("FP8 GEMM", state, proof.found, proof.fix)


def _network() -> Iterator[Examined]:
    root = Path("/sys/class/infiniband")
    devices = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if not devices:
        yield Examined("RDMA", "note", "no device", "nodes communicate over TCP: enough for one node or for CPUs.")
        return
    yield Examined("RDMA", "ok", ", ".join(devices[:8]))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    short = locked != resource.RLIM_INFINITY
    fix = "RDMA needs it unlimited: limits.conf, and LimitMEMLOCK=infinity of slurmd." if short else ""
    yield Examined("locked memory", "lacks" if short else "ok", f"{locked} bytes" if short else "unlimited", fix)


def _slurm() -> Iterator[Examined]:
    if not slurm.is_there():
        fix = "on a login node load the site's Slurm module; without Slurm `mq launch submit` uses this machine."
        yield Examined("Slurm", "note", "this machine belongs to no cluster", fix)
        return
    try:
        ping = slurm.ask("scontrol", "ping", timeout_s=30)
        values = slurm.show_config()
        partitions, nodes = slurm.show_partitions(), slurm.show_nodes()
    except UserError as error:
        yield Examined(
            "Slurm",
            "lacks",
            str(error).strip(),
            "ask the site's administrators: slurmctld must answer (SLURM_CONF, munge).",
        )
        return
    up = "is UP" in ping
    yield Examined("slurmctld", "ok" if up else "lacks", ping.strip().splitlines()[0], "" if up else "start slurmctld.")
    yield Examined("Slurm version", "ok", values.get("SLURM_VERSION", "unknown"))
    yield from _settings(values)
    for name, partition in partitions.items():
        members = [node for node in nodes.values() if name in node.get("Partitions", "").split(",")]
        usable = sum(slurm.is_usable(node) for node in members)
        state = partition.get("State", "unknown")
        unseen = slurm.unseen_nodes(partition, len(members))
        right = state == "UP" and usable + unseen > 0
        powered_down = f" ({unseen} not shown: may be powered down)" if unseen else ""
        found = f"{state}, {usable} of {len(members) + unseen} nodes usable{powered_down}"
        found += f", time limit {partition.get('MaxTime')}"
        yield Examined(f"partition {name}", "ok" if right else "note", found)
    for name, node in nodes.items():
        if not slurm.is_usable(node):
            reason = node.get("Reason", "no reason given")
            fix = f"after the repair: scontrol update NodeName={name} State=RESUME"
            yield Examined(f"node {name}", "note", f"{node.get('State')}: {reason}", fix)


def _settings(values: dict[str, str]) -> Iterator[Examined]:
    """Settings of Slurm that decide whether a run survives."""
    requeue = values.get("JobRequeue") == "1"
    fix = (
        ""
        if requeue
        else "requeueing is off by default here; jobs of mq launch request it (--requeue), or use --chain."
    )
    yield Examined("JobRequeue", "ok" if requeue else "note", values.get("JobRequeue", "unknown"), fix)
    wait = slurm_seconds(values.get("KillWait", ""))
    short = wait is not None and wait < 30
    fix = "seconds between SIGTERM and SIGKILL: a save at `scontrol requeue` must fit in." if short else ""
    yield Examined("KillWait", "note" if short else "ok", values.get("KillWait", "unknown"), fix)
    early = "preempt_send_user_signal" in values.get("SlurmctldParameters", "")
    preempts = values.get("PreemptType", "") not in ("", "preempt/none", "(null)")
    if preempts:
        fix = "" if early else "SlurmctldParameters=preempt_send_user_signal warns runs before a preemption."
        yield Examined("preemption", "ok" if early else "note", values.get("PreemptType", ""), fix)
    kept = values.get("AccountingStorageType", "")
    there = "slurmdbd" in kept
    fix = "" if there else "no sacct: status comes from squeue and the runs' own files."
    yield Examined("accounting", "ok" if there else "note", kept or "none", fix)


def slurm_seconds(text: str) -> float | None:
    """``30 sec`` as 30."""
    words = text.split()
    return float(words[0]) if words and words[0].replace(".", "").isdecimal() else None


def _containers() -> Iterator[Examined]:
    if shutil.which("srun") is not None:
        pyxis = "--container-image" in (_run(["srun", "--help"]) or "")
        yield Examined("pyxis", "ok", "there" if pyxis else "not installed; needed only for container: pyxis")
    apptainer = shutil.which("apptainer") is not None
    yield Examined("apptainer", "ok", "there" if apptainer else "not installed; needed only for container: apptainer")


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def main(arguments: Sequence[str]) -> int:
    """Prints what was found; 1 where something lacks."""
    parser = Parser(
        "mq doctor",
        description="Shows what this machine, and the Slurm cluster it belongs to, have and lack for runs, and what to "
        "do for each. On a GPU it computes an FP8 GEMM and checks the result. Ends with 1 where something that every "
        "run here needs is missing or wrong.",
        examples=["mq doctor", "mq doctor --json", "srun -N1 mq doctor     on a compute node"],
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    found = examine()
    if options.json:
        print(json.dumps([asdict(item) for item in found], indent=2))
    else:
        width = max(len(item.what) for item in found)
        for item in found:
            print(f"{item.state:<6} {item.what:<{width}}  {item.found}")
            if item.fix:
                print(f"{'':<6} {'':<{width}}  -> {item.fix}")
    return EXIT_FAILURE if any(item.state == "lacks" for item in found) else 0


if __name__ == "__main__":
    run_program(main)
