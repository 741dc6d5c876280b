"""``tensor.cuda()``, ``tensor.to("cuda")`` and ``module.cuda()`` leave things on the CPU.

Replaces: ``to``, ``cuda``, ``record_stream`` and ``type`` of ``torch.Tensor``, ``cuda`` of ``torch.nn.Module``.
    ``type`` names the CUDA type, since megatron-core sorts parameters and gradients by this name and knows no other.
Needed: with every megatron-core so far (0.19.2 too).
When: before megatron.core is imported, on processes without a GPU.
Upstream: NVIDIA/Megatron-LM pull request 6270 (open) does so for model conversion, not for training.
Can go: when megatron-core trains on a CPU over gloo.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_qwen.core_patches.replacement import wrap

_CPU = torch.device("cpu")


def apply() -> None:
    """Replaces them, each once."""
    tensor: Any = torch.Tensor
    wrap(tensor, "to", _on_cpu)
    wrap(tensor, "type", _as_cuda_type)
    tensor.cuda, tensor.record_stream = _itself, _nothing
    module: Any = torch.nn.Module
    module.cuda = _itself


def is_cuda(device: object) -> bool:
    """Whether a device, or its name, is a GPU's."""
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _on_cpu(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return plain(self, *args, **kwargs)

    return to


def _as_cuda_type(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return type_


def _itself(self: Any, *args: object, **kwargs: object) -> Any:
    return self


def _nothing(self: Any, stream: object) -> None:
    pass
