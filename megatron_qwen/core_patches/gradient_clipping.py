"""Gradients are clipped in one pass.

Replaces: ``multi_tensor_scale_impl`` of ``megatron.core.optimizer.clip_grads``, where it is megatron-core's own
    (neither Transformer Engine nor NVIDIA's apex imports). The product is the same bit for bit.
Needed: with megatron-core 0.19.2, whose own multiplies into a new tensor and copies that over the gradient: three
    passes over memory and room for another gradient.
When: after megatron.core is imported, on every process.
Can go: when ``local_multi_tensor_scale`` (megatron/core/utils.py) multiplies in place.
"""

from typing import Any

import torch


def apply() -> None:
    """Replaces it; what is replaced is the same after every call."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    clipping: Any = clip_grads
    if clipping.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clipping.multi_tensor_scale_impl = scale


def scale(chunk_size: int, noop_flag: torch.Tensor, tensors: list[list[torch.Tensor]], factor: float) -> None:
    """Multiplies each tensor of the first list into its place in the second; the signature is apex's."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)
