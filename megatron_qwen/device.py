"""CUDA or CPU: what this process computes on, and what it has. Only this file and core_patches/ name torch.cuda."""

import os
import resource

import torch

from megatron_qwen.errors import ConfigError, Problem

_CPU = torch.device("cpu")
_CPU_LOGITS_BYTES = 64 << 20


def has_cuda() -> bool:
    """Whether ranks compute on GPUs."""
    return torch.cuda.is_available()


def count() -> int:
    """GPUs of this node that a process sees; 0 without any."""
    return torch.cuda.device_count() if has_cuda() else 0


def backend() -> str:
    """The torch.distributed backend of the device."""
    return "nccl" if has_cuda() else "gloo"


def select(local_rank: int, *, local_world_size: int = 1) -> None:
    """Makes the GPU of this rank the current one; nothing to do on a CPU.

    Args:
        local_rank: rank on this node.
        local_world_size: ranks on this node.

    Raises:
        ConfigError: there are more ranks than GPUs.
    """
    if not has_cuda():
        return
    gpus = torch.cuda.device_count()
    bound = gpus == 1 and "SLURM_PROCID" in os.environ  # srun --gpus-per-task shows each rank its own GPU alone
    if not bound and local_world_size > gpus:
        fix = f"this node shows {gpus} GPUs; start as many ranks, or set CUDA_VISIBLE_DEVICES='' to compute on the CPU."
        raise ConfigError(Problem("ranks on this node", local_world_size, fix))
    torch.cuda.set_device(0 if bound else local_rank)


def current() -> torch.device:
    """The device that ``select`` chose."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def device_name() -> str:
    """What the log and the performance figures call the device."""
    return torch.cuda.get_device_name() if has_cuda() else "CPU"


def compute_capability() -> tuple[int, int]:
    """CUDA compute capability, (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if has_cuda() else (0, 0)


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Most memory this rank held at once: allocator peak on a GPU, resident set on a CPU."""
    if has_cuda():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_gib() -> float | None:
    """Memory of a GPU, GiB; None on a CPU, whose memory nobody hands out by rank."""
    if not has_cuda():
        return None
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / 2**30


def rng_state() -> torch.Tensor:
    """State of the device's default generator."""
    return torch.cuda.get_rng_state() if has_cuda() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restores what ``rng_state`` gave."""
    torch.cuda.set_rng_state(state) if has_cuda() else torch.set_rng_state(state)


def loss_chunk_tokens(row_bytes: int) -> int:
    """Tokens whose logits the loss holds at once: what fills a GPU's kernels; on a CPU, up to 64 MiB.

    Args:
        row_bytes: of one token's logits.
    """
    return 4096 if has_cuda() else min(max(_CPU_LOGITS_BYTES // row_bytes, 128), 4096)


def fair_threads(local_ranks: int) -> int:
    """CPU threads of a rank when the ranks of a node share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))


def set_threads(count: int) -> None:
    """Fixes the CPU threads of this rank; results on a CPU depend on the count, bit for bit."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
