"""CUDA or CPU: what this process computes on, and what it has. Only this file and core_patches/ name torch.cuda."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_qwen.errors import ConfigError, Problem

_CPU = torch.device("cpu")
_CPU_LOGITS_BYTES = 64 << 20


def in_use() -> bool:
    """Whether this process has begun to use a GPU, and holds memory of it."""
    return bool(torch.cuda.is_initialized())


def has_cuda() -> bool:
    """Whether ranks compute on GPUs."""
    return torch.cuda.is_available()


def count() -> int:
    """Number of GPUs that this process sees; 0 on a CPU."""
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
        fix = (
            f"must be at most the {gpus} visible GPUs of this node; start fewer ranks, "
            "or set CUDA_VISIBLE_DEVICES='' to compute on the CPU."
        )
        raise ConfigError(Problem("ranks on this node", local_world_size, fix))
    torch.cuda.set_device(0 if bound else local_rank)


def current() -> torch.device:
    """The device that ``select`` made current."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def device_name() -> str:
    """Name of the device for the log and performance.json; ``CPU`` without a GPU."""
    return torch.cuda.get_device_name() if has_cuda() else "CPU"


def library_versions() -> dict[str, str]:
    """Versions of what computes: torch, and with a GPU CUDA, cuDNN and NCCL; on a CPU the instructions that it uses."""
    found = {"torch": torch.__version__, "cpu instructions": torch.backends.cpu.get_cpu_capability()}
    if has_cuda():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def compute_capability() -> tuple[int, int]:
    """CUDA compute capability, (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if has_cuda() else (0, 0)


def synchronize() -> None:
    """Waits until all queued work of the device has finished."""
    if has_cuda():
        torch.cuda.synchronize()


def elapsed_s(work: Callable[[], object]) -> float:
    """Seconds that work takes: of its kernels on a GPU, once those queued before have finished; else of the call."""
    if not has_cuda():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_memory_bytes() -> int:
    """Peak memory of this rank in bytes: of the allocator on a GPU, resident set on a CPU."""
    if has_cuda():
        return int(torch.cuda.max_memory_allocated())
    # Linux keeps ru_maxrss across exec: getrusage would report the peak of the process that started this rank.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # the file says kB and means KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_gib() -> float | None:
    """Memory of the GPU in GiB; None on a CPU, whose memory all ranks of the host share."""
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
    """Tokens per chunk of logits in the loss: 4096 on a GPU, which fills its kernels; on a CPU 64 MiB of logits.

    Args:
        row_bytes: bytes of one token's logits.
    """
    # At least 128 tokens, whatever the vocabulary: every chunk reads the whole output matrix. Chosen by hand.
    return 4096 if has_cuda() else min(max(_CPU_LOGITS_BYTES // row_bytes, 128), 4096)


def fair_threads(local_ranks: int) -> int:
    """CPU threads per rank if the ranks of a node share its cores evenly; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))


def set_threads(count: int) -> None:
    """Sets the CPU threads of this rank; on a CPU, results depend on the number in the last bits."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
