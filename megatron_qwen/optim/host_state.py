"""An optimizer whose main weights and moments are on the host (performance.optimizer_offload_fraction).

megatron-core 0.19.2 makes that state by a step with random gradients, at whatever rate is set: it moves the weights and
leaves moments behind. It counts steps tensor by tensor on the host and in the groups of what stays on the device.
"""

from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def start(hybrid: HybridDeviceOptimizer) -> None:
    """Makes the state that no step has been taken with: zero moments, main weights equal to the model's."""
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


def step_counts(optimizer: ChainedOptimizer) -> list[int]:
    """Steps that the parts on the host have taken, one number for each of their tensors."""
    hybrids: list[Any] = [
        part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, HybridDeviceOptimizer)
    ]
    states = [state for hybrid in hybrids for inner in hybrid.sub_optimizers for state in inner.state.values()]
    groups = [group for hybrid in hybrids for inner in hybrid.sub_optimizers for group in inner.param_groups]
    return [int(place["step"]) for place in (*states, *groups) if "step" in place]
