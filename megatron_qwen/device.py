"""CUDA or CPU: the only file that queries or patches torch.cuda.

megatron-core calls torch.cuda throughout. On a machine without CUDA, ``prepare()`` maps those calls to the CPU, so that
megatron-core's own code paths run over gloo; with CUDA it maps nothing. It must run before megatron.core is imported,
because megatron-core binds some of these names at import.
"""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device as torch_device

from megatron_qwen.core_patches import shared_gloo_device
from megatron_qwen.errors import ConfigError, Problem

_CPU = torch.device("cpu")
_CPU_LOGITS_BYTES = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


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


def compute_capability() -> tuple[int, int]:
    """CUDA compute capability, (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if has_cuda() else (0, 0)


def synchronize() -> None:
    """Waits until all queued work of the device has finished."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory of this rank in bytes: of the allocator on a GPU, resident set on a CPU."""
    if has_cuda():
        return int(torch.cuda.max_memory_allocated())
    import resource

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
    return 4096 if has_cuda() else min(max(_CPU_LOGITS_BYTES // row_bytes, 128), 4096)


def fair_threads(local_ranks: int) -> int:
    """CPU threads per rank if the ranks of a node share its cores evenly; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))


def set_threads(count: int) -> None:
    """Sets the CPU threads of this rank; on a CPU, results depend on the number in the last bits."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)


@functools.cache
def prepare() -> None:
    """Makes megatron-core importable and runnable on this machine. Call it once per process, before importing it."""
    # megatron-core warns on every rank about missing libraries; our own log says which kernels run.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*pynvml.*")
    # Warnings about how megatron-core calls torch.distributed.checkpoint.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
    for name in ("torch.utils.cpp_extension", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    shared_gloo_device.apply()
    if has_cuda():
        # Expandable segments reduce fragmentation. The variable is read at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        return
    keep_freed_memory()
    _hide_gpu_libraries()
    _map_calls()
    _map_factories()
    _map_tensor_methods()
    _map_collectives()
    _map_expert_splits()


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks: returned to the kernel, every reuse costs a page fault per 4 KiB."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _hide_gpu_libraries() -> None:
    """Hides installed GPU libraries from megatron-core where there is no GPU (a GPU image on a login node)."""
    for name in ("transformer_engine", "apex.optimizers", "apex.multi_tensor_apply"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None makes an import fail as if it were not installed


class _Stream:
    """Stands for a CUDA stream or event on a CPU, where all operations are synchronous."""

    device = _CPU

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> "_Stream":
        return self

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _map_calls() -> None:
    stream = _Stream()
    cuda: Any = torch.cuda

    @contextlib.contextmanager
    def nothing(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": nothing,
        "device": nothing,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": _OneGenerator(),
        # torch defers these calls until CUDA is initialised, which never happens on a CPU.
        "_lazy_call": lambda callable_, **kwargs: callable_(),
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state = replacements["get_rng_state"]
    cuda.random.set_rng_state = replacements["set_rng_state"]


class _OneGenerator:
    """``torch.cuda.default_generators`` where every index is the CPU's generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


def _is_cuda_device(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _map_factories() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda_device(kwargs.get("device")):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return call

    # `with torch.device(...)` identifies factories by identity and caches them: fill the cache before replacing them.
    torch_device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _map_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    plain_to, plain_type = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda_device(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = _CPU
        moved: torch.Tensor = plain_to(self, *args, **kwargs)
        return moved

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core groups parameters by this type name, and knows only the CUDA names.
        name = plain_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _map_collectives() -> None:
    """Allows pieces of different sizes, as expert tensor parallelism has: gloo supports only equal sizes."""
    plain_gather, plain_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(outputs: list[torch.Tensor], piece: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        longest = max(output.shape[0] if output.dim() else 1 for output in outputs)
        if all(output.shape == piece.shape for output in outputs):
            return plain_gather(outputs, piece, group=group, async_op=async_op)
        assert not async_op
        padded = piece.new_zeros((longest, *piece.shape[1:]))
        padded[: piece.shape[0]] = piece
        gathered = [torch.empty_like(padded) for _ in outputs]
        plain_gather(gathered, padded, group=group)
        for output, whole in zip(outputs, gathered, strict=True):
            output.copy_(whole[: output.shape[0]])
        return None

    def reduce_scatter(
        output: torch.Tensor,
        pieces: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(piece.shape == output.shape for piece in pieces):
            return plain_scatter(output, pieces, op=op, group=group, async_op=async_op)
        assert not async_op
        whole = torch.cat(pieces)
        dist.all_reduce(whole, op=op, group=group)
        start = sum(piece.shape[0] for piece in pieces[: dist.get_rank(group)])
        output.copy_(whole[start : start + output.shape[0]])
        return None

    collectives: Any = dist
    collectives.all_gather, collectives.reduce_scatter = all_gather, reduce_scatter
    dist.all_gather_into_tensor = _free_for_one(dist.all_gather_into_tensor)
    dist.reduce_scatter_tensor = _free_for_one(dist.reduce_scatter_tensor)


def _free_for_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that does nothing in a group of one rank whose output and input are the same memory.

    gloo copies the whole buffer even then; for the gradients of a single rank that is most of a collective's time.
    """

    @functools.wraps(collective)
    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = dist.get_world_size(kwargs.get("group")) == 1
        if alone and output.data_ptr() == input.data_ptr() and output.numel() == input.numel():
            return _Done() if kwargs.get("async_op") else None
        return collective(output, input, *args, **kwargs)

    return call


class _Done:
    """Handle of a collective that has finished."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _map_expert_splits() -> None:
    """The expert all-to-all needs its split sizes as host lists; megatron-core converts only CUDA tensors to lists."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def host_list(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = host_list
    token_dispatcher.maybe_move_tensor_to_cpu = host_list
