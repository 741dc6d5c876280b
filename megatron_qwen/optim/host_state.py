"""An optimizer whose main weights and moments are on the host (performance.optimizer_offload_fraction).

megatron-core 0.19.2 creates that state by a step with random gradients at the current learning rate, which would change
the weights and leave non-zero moments.
"""

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def start(hybrid: HybridDeviceOptimizer) -> None:
    """Creates the state before the first step: zero moments and step counts, main weights equal to the model's."""
    rates = [group["lr"] for group in hybrid.param_groups]
    for group in hybrid.param_groups:
        group["lr"] = 0.0
    hybrid.dummy_step()
    for group, rate in zip(hybrid.param_groups, rates, strict=True):
        group["lr"] = rate
    for optimizer in hybrid.sub_optimizers:
        for state in optimizer.state.values():
            for name in _MOMENTS:
                state[name].zero_()
            if "step" in state:
                state["step"].zero_()
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
    for group in hybrid.gpu_optimizer.param_groups if hybrid.gpu_optimizer is not None else ():
        for parameter in group["params"]:
            parameter.grad = None
