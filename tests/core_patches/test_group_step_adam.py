"""GroupStepAdamW is torch's AdamW with the step in the parameter group."""

import copy
from typing import Any

import torch

from megatron_qwen.core_patches.group_step_adam import GroupStepAdamW, adam_in_use


def observe(prepared: bool) -> dict[str, Any]:
    """Which Adam megatron-core takes, and whether it treats it as a fused one."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    same = optimizer.Adam is distrib_optimizer.Adam
    fused = [not optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE]
    return {"adam": optimizer.Adam.__name__, "same": same, "fused": fused, "log": adam_in_use()}


def test_megatron_core_takes_it(observed):
    assert observed.plain["adam"] == "AdamW"
    assert observed.plain["fused"] == [False, False]
    assert observed.prepared["adam"] == "GroupStepAdamW"
    assert observed.prepared["same"]
    assert observed.prepared["fused"] == [True, True]
    assert observed.prepared["log"].startswith("AdamW with torch's fused kernel")


def test_equals_torch():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(value.detach().clone()) for value in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    a, b = GroupStepAdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for _ in range(6):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert a.param_groups[0]["step"] == 6


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = GroupStepAdamW([parameter], lr=1.0, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    assert "step" not in optimizer.param_groups[0]


def test_state_there_and_back():
    """The step is in the group, and a loaded optimizer takes the same next step."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4))]
    with torch.no_grad():
        weights[1].copy_(weights[0])
    first, second = (GroupStepAdamW([weight], lr=0.1) for weight in weights)
    gradients = torch.randn(2, 4)
    weights[0].grad = gradients[0]
    first.step()
    saved = first.state_dict()
    assert saved["param_groups"][0]["step"] == 1
    second.load_state_dict(copy.deepcopy(saved))  # else both would share their moments
    with torch.no_grad():
        weights[1].copy_(weights[0])
    for weight, optimizer in zip(weights, (first, second), strict=True):
        weight.grad = gradients[1].clone()
        optimizer.step()
    assert torch.equal(*weights)
