"""The optimizer's part of a checkpoint: main weights and moments per parameter, and one step count.

megatron-core also saves the parameter groups (rates, decays, in the order of this layout's optimizers). They
follow from the configuration and tie a checkpoint to expert parallelism: with one expert rank all parameters
are in one optimizer, with more the experts have their own. So they stay out, and a load takes the groups it finds.
"""

from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.models.sharding import CHECKPOINT_METADATA

_SHARDING_TYPE = CHECKPOINT_METADATA["distrib_optim_sharding_type"]


def sharded(
    optimizer: ChainedOptimizer, model_state: dict[str, Any], groups: ProcessGroupCollection, *, loading: bool
) -> dict[str, Any]:
    """Sharded tensors of every optimizer of the chain; their names are the same under every layout."""
    metadata = {**CHECKPOINT_METADATA, "dp_cp_group": groups.dp_cp}
    whole = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
    parts = [whole] if len(optimizer.chained_optimizers) == 1 else list(whole.values())
    states = {str(index): part["param_state"] for index, part in enumerate(parts)}
    if not loading:
        for state in states.values():
            _claim(state)
    return states


def _claim(state: Any) -> None:
    """Has each rank save what it has gathered: nobody else has the same (core_patches/state_gather.py)."""
    for tensors in (state or {}).values():
        for tensor in tensors.values():
            pipeline, tensor_rank, _ = tensor.replica_id
            tensor.replica_id = (pipeline, tensor_rank, 0)


def load(optimizer: ChainedOptimizer, loaded: dict[str, Any], *, step: int) -> None:
    """Fills every optimizer of the chain with loaded tensors.

    Args:
        optimizer: as built under the present layout.
        loaded: what ``sharded`` asked for, filled.
        step: optimizer steps taken so far; Adam's bias correction depends on it.
    """
    for index, part in enumerate(optimizer.chained_optimizers):
        content = part.state_dict()
        for group in content["optimizer"]["param_groups"]:
            group["step"] = step
        content |= {"param_state": loaded[str(index)], "param_state_sharding_type": _SHARDING_TYPE}
        part.load_state_dict(content)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            # HybridDeviceOptimizer.step (megatron-core 0.19.2) first copies its own groups into those of its inner
            # optimizers, and never copies back. The inner optimizer of what stays on the device counts steps in its
            # group: with a count here, its bias correction would stay at the resumed step. The one on the host counts
            # per tensor.
            for group in part.optimizer.param_groups:
                group.pop("step", None)


def step_count(optimizer: ChainedOptimizer) -> int:
    """Optimizer steps taken, from whichever group has parameters on this rank."""
    counts = [int(group.get("step", 0) or 0) for group in optimizer.param_groups]
    return max([*counts, *_steps_on_host(optimizer)], default=0)


def _steps_on_host(optimizer: ChainedOptimizer) -> list[int]:
    """Steps of optimizers that are partly on the host: a tensor there has its own count, what stays has its group's."""
    hybrids: list[Any] = [
        part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, HybridDeviceOptimizer)
    ]
    states = [state for hybrid in hybrids for inner in hybrid.sub_optimizers for state in inner.state.values()]
    groups = [group for hybrid in hybrids for inner in hybrid.sub_optimizers for group in inner.param_groups]
    return [int(place["step"]) for place in (*states, *groups) if "step" in place]
