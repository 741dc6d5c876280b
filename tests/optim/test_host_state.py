"""State on the host begins as if no step had been taken."""

import torch

from megatron_qwen.optim.host_state import start


class Hybrid:
    """What megatron-core's HybridDeviceOptimizer does, without a GPU: one part on the host, one on the device."""

    def __init__(self) -> None:
        self.weights = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(4))]
        self.sub_optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in self.weights]
        self.gpu_optimizer = self.sub_optimizers[1]
        self.gpu_optimizer.param_groups[0]["step"] = 1
        self.param_groups = [{"lr": 0.1}, {"lr": 0.2}]

    def dummy_step(self) -> None:
        for group, optimizer in zip(self.param_groups, self.sub_optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = group["lr"]
        for weight in self.weights:
            weight.grad = torch.randn_like(weight)
        for optimizer in self.sub_optimizers:
            optimizer.step()


def test_nothing_has_moved():
    hybrid = Hybrid()
    before = [weight.detach().clone() for weight in hybrid.weights]
    start(hybrid)
    assert all(torch.equal(now, then) for now, then in zip(hybrid.weights, before, strict=True))
    assert [group["lr"] for group in hybrid.param_groups] == [0.1, 0.2]
    for optimizer, weight in zip(hybrid.sub_optimizers, hybrid.weights, strict=True):
        state = optimizer.state[weight]
        assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq", "step"))
    assert hybrid.gpu_optimizer.param_groups[0]["step"] == 0
    assert hybrid.weights[1].grad is None
