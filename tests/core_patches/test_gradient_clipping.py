"""Gradients are clipped in place, to the bit as megatron-core does it."""

from typing import Any

import torch

from megatron_qwen.core_patches import gradient_clipping


def observe(prepared: bool) -> dict[str, Any]:
    """Whether megatron-core's own function clips, and what clipping gives."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    torch.manual_seed(0)
    gradients = [torch.randn(5, 7), torch.randn(3)]
    places = [tensor.data_ptr() for tensor in gradients]
    clip_grads.multi_tensor_scale_impl(0, torch.zeros(1), [gradients, gradients], 0.3)
    assert places == [tensor.data_ptr() for tensor in gradients]
    own = clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale
    return {"own": own, "values": [tensor.flatten().tolist() for tensor in gradients]}


def test_ours_is_in_place(observed):
    assert observed.plain["own"]
    assert not observed.prepared["own"]
    assert observed.prepared["values"] == observed.plain["values"]


def test_no_memory_is_taken(monkeypatch):
    """The product goes to the gradient itself."""
    seen = []
    monkeypatch.setattr(torch, "mul", lambda source, factor, *, out: seen.append((source is out, factor)))
    gradients = [torch.ones(2), torch.ones(3)]
    gradient_clipping.scale(0, torch.zeros(1), [gradients, gradients], 0.5)
    assert seen == [(True, 0.5), (True, 0.5)]
