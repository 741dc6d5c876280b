"""``torch.empty(..., device="cuda")`` and its like make tensors on the CPU.

Replaces: the functions of ``torch`` listed below, by wrappers that change the device; ``pin_memory`` is dropped, since
    only a driver can pin memory.
Needed: with every megatron-core so far (0.19.2 too), which writes ``device="cuda"`` and
    ``device=torch.cuda.current_device()`` in its buffers, its losses and its clipping.
When: before megatron.core is imported, on processes without a GPU.
Upstream: NVIDIA/Megatron-LM pull request 6270 (open) does so for model conversion, not for training.
Can go: when megatron-core trains on a CPU over gloo.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device as torch_device

from megatron_qwen.core_patches.cuda_tensors import is_cuda
from megatron_qwen.core_patches.replacement import wrap

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


def apply() -> None:
    """Wraps them, each once."""
    # `with torch.device(...)` knows the factories by identity and looks them up once: before they are replaced.
    torch_device._device_constructors()
    for name in _FACTORIES:
        wrap(torch, name, _on_cpu)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call
