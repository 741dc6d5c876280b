"""What an attempt computes with: code, packages, libraries, driver, processor; and how that differs from before.

A resume is bit for bit only where all of this is as it was. It is recorded with every attempt and in every checkpoint.
"""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.packages import installed
from megatron_qwen.provenance import code_version

_DRIVER = Path("/proc/driver/nvidia/version")
# Variables of libraries that change which algorithm computes or in which order sums are taken.
_VARIABLES = ("CUBLAS_", "CUDNN_", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS", "NVIDIA_TF32", "NVTE_", "MKL_", "ATEN_CPU_")
# Of the packages, those that compute. The others read, write and show.
_COMPUTING = re.compile(
    r"torch|numpy|megatron-core|triton|apex|deep-ep|(transformer-engine|flash-attn|nvidia-|cuda-|nv-grouped).*"
)
# The kernel moves bytes. The driver compiles kernels only where a library brings PTX alone. Python computes no tensor.
_WITHOUT_EFFECT = ("kernel", "driver", "python")
_NAMED_NODES = 8


@dataclass(frozen=True)
class EnvironmentChange:
    """Something that is otherwise than before.

    Args:
        name: of a fact, or ``package NAME``.
        before: None where there was none.
        now: None where there is none.
    """

    name: str
    before: str | None
    now: str | None

    @property
    def may_change_values(self) -> bool:
        """Whether numbers may come out differently in their last bits."""
        kind, _, package = self.name.partition(" ")
        if kind == "package":
            return _COMPUTING.fullmatch(package) is not None
        return self.name not in _WITHOUT_EFFECT

    def __str__(self) -> str:
        return f"{self.name.removeprefix('package ')} {self.before or 'absent'} -> {self.now or 'absent'}"


@cache
def environment() -> dict[str, Any]:
    """Facts of this process, and the versions of its packages; read once."""
    code = code_version()
    facts = {
        "code": f"{code['version']} {code['commit'] or ''}{' with changes' if code['modified'] else ''}".strip(),
        "python": platform.python_version(),
        **device.library_versions(),
        "device": device.device_name(),
        "driver": _driver(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "processor": _processor(),
    }
    variables = {f"${name}": value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    found = {name: str(value) for name, value in {**facts, **variables}.items() if value}
    return {"facts": found, "packages": installed().versions(), "interpreter": sys.executable}


def environment_of_attempt() -> dict[str, Any]:
    """The same, with the number of ranks and of threads, which may change the order of sums."""
    own = environment()
    size = {"ranks": str(dist.get_world_size()), "threads": str(torch.get_num_threads())}
    return {**own, "facts": {**own["facts"], **size}}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[EnvironmentChange]:
    """What differs between two environments."""
    found = []
    for prefix, part in (("", "facts"), ("package ", "packages")):
        old, new = before.get(part) or {}, now.get(part) or {}
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                found.append(EnvironmentChange(prefix + name, old.get(name), new.get(name)))
    return found


def differing_nodes() -> list[str]:
    """A line a node that computes with something else than rank 0, on rank 0; called by all ranks together."""
    first = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
    mine = environment() if first or dist.get_rank() == 0 else None
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()[:8] if mine else None
    digests: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    # Thousands of nodes must not all send theirs.
    odd = [rank for rank, one in enumerate(digests) if one not in (None, digests[0])][:_NAMED_NODES]
    if not odd:
        return []
    place = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((place, mine) if dist.get_rank() in odd else None, everyone)
    lines = []
    for node, one in (item for item in everyone or () if item is not None):
        found = changes(environment(), one)
        lines.append(f"{node}: {', '.join(map(str, found[:6]))}{', ...' if len(found) > 6 else ''}")
    return lines


def _driver() -> str:
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\S+)", _text(_DRIVER))
    return match[1] if match else ""


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
