"""A router without an expert bias compiles nothing for it."""

from types import SimpleNamespace

import torch

from megatron_qwen.core_patches import expert_bias


def observe(prepared: bool) -> int:
    """Functions that torch has traced to update no bias."""
    from megatron.core.transformer.moe.router import TopKRouter
    from torch._dynamo.utils import counters

    before = counters["frames"]["total"]
    TopKRouter._apply_expert_bias(SimpleNamespace(enable_expert_bias=False), torch.ones(4, 2, dtype=torch.bool))
    return counters["frames"]["total"] - before


def test_nothing_is_compiled(observed):
    assert observed.prepared == 0
    assert observed.plain > 0


def test_a_bias_is_updated():
    calls = []
    update = expert_bias._where_there_is_one(lambda self, routing_map, padding_mask=None: calls.append(padding_mask))
    for enabled in (True, False):
        update(SimpleNamespace(enable_expert_bias=enabled), None, padding_mask="mask")
    assert calls == ["mask"]
