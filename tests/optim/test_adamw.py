"""GroupStepAdamW is torch's AdamW with the step in the parameter group."""

import torch

from megatron_qwen.optim.adamw import GroupStepAdamW, install_where_needed


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


def test_clipping_equals_the_cores(pool):
    assert pool[1].run(clipped, 0)[0] == [True, True]


def clipped(_: int) -> list[bool]:
    """Whether what is installed is in place, and bit for bit what the core computes."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    install_where_needed()
    installed = clip_grads.multi_tensor_scale_impl
    gradients = [torch.randn(5, 7), torch.randn(3)]
    expected = [tensor.clone() for tensor in gradients]
    installed(0, torch.zeros(1), [gradients, gradients], 0.3)
    utils.local_multi_tensor_scale(0, torch.zeros(1), [expected, expected], 0.3)
    same = all(torch.equal(mine, other) for mine, other in zip(gradients, expected, strict=True))
    return [installed is not utils.local_multi_tensor_scale, same]
