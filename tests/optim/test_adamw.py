"""GroupStepAdamW is torch's AdamW with the step in the parameter group."""

import torch

from megatron_qwen.optim.adamw import GroupStepAdamW


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
