"""The hardware and libraries that all ranks have in common, so that automatic choices agree on every rank."""

import importlib
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.torch_backend.compiled import compiler_is_here


def common_machine(backend: Backend) -> Machine:
    """The smallest memory of any rank, and the libraries that every rank has.

    Ranks that chose differently would call different collectives and wait for each other forever.
    """
    libraries = frozenset(name for name in ("deep_ep",) if device.has_cuda() and _imports(name))
    mine = Machine(
        backend.name,
        device.has_cuda(),
        device.total_memory_gib(),
        libraries,
        compiler=compiler_is_here(),
        threads=torch.get_num_threads(),
    )
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len(names := {one.backend for one in everyone}) > 1:
        fix = f"is {' on some ranks and '.join(sorted(names))} on others; set precision.backend to te or torch."
        raise ConfigError(Problem("backend", None, fix))
    # What the smallest rank can do, every rank can.
    memory = [one.memory_gib for one in everyone if one.memory_gib is not None]
    return replace(
        mine,
        memory_gib=min(memory) if memory else None,
        libraries=frozenset.intersection(*(one.libraries for one in everyone)),
        compiler=all(one.compiler for one in everyone),
        threads=max(one.threads for one in everyone),
    )


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # whatever a broken library raises
        return False
    return True
