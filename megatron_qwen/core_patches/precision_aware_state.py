"""The state of the precision-aware optimizer is saved and loaded as any other optimizer's.

Transformer Engine's Adam keeps, of the fp32 main weights, the 16 bits that the bf16 weights lack. Here they are put
together with the bf16 weights on the way into a checkpoint and taken apart on the way out of one, so a checkpoint does
not tell what the optimizer kept. A weight exactly between two bf16 numbers is rounded up here and to the even one
elsewhere: after a load from another optimizer, data-parallel ranks may differ in such weights (one in some 130,000)
until the first update gathers them.

Replaces: of one ``DistributedOptimizer`` of megatron-core, ``_get_main_param_and_optimizer_states``,
    ``_set_main_param_and_optimizer_states`` and ``init_state_fn``; of the FusedAdam in it, ``state_dict``.
Needed: with megatron-core 0.19.2, which saves those 16 bits where a checkpoint has the main weights, so that no other
    optimizer could read it, and whose own load refuses them. Its ``init_state_fn`` calls ``initialize_state`` without
    an argument that Transformer Engine requires since 2.1.
When: on each optimizer that is built with precision.use_precision_aware_optimizer; optim/build.py applies it.
Upstream: NVIDIA/Megatron-LM pull requests 4222 (the load, open) and 7288 (``initialize_state``, open).
Can go: when megatron-core saves whole main weights of this optimizer, and loads them.
"""

from types import MethodType
from typing import Any

import torch


def whole_weights(weights: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """fp32 main weights, exactly.

    Transformer Engine rounds the upper half up where the lower one, as a signed number, is negative
    (multi_tensor/adam.cu); that is undone first.

    Args:
        weights: bf16.
        rest: lower halves, int16, of the same shape.
    """
    upper = weights.view(torch.int16).int() - (rest < 0).int()
    return ((upper << 16) | (rest.int() & 0xFFFF)).view(torch.float32)


def split_weights(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 weights and lower halves that ``whole_weights`` puts together.

    Args:
        whole: fp32, contiguous.
    """
    bits = whole.view(torch.int32)
    rest = bits.to(torch.int16)  # the lower 16 bits, as they are
    upper = ((bits >> 16) + (rest < 0).int()).to(torch.int16)
    return upper.view(torch.bfloat16), rest


def apply(*, optimizer: Any) -> None:
    """Gives one optimizer the ways in and out described above, once.

    Args:
        optimizer: a DistributedOptimizer around FusedAdam with use_precision_aware_optimizer.
    """
    part = optimizer
    if part.init_state_fn is _initialise:
        return
    plain_get, plain_set = part._get_main_param_and_optimizer_states, part._set_main_param_and_optimizer_states

    def shard_of(model_param: torch.Tensor) -> torch.Tensor:
        group, order = part.model_param_group_index_map[model_param]
        shard: torch.Tensor = part.optimizer.param_groups[group]["params"][order]
        return shard

    def get(_: Any, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = plain_get(model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = whole_weights(shard_of(model_param).detach(), tensors["param"])
        return tensors

    def put(_: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        shard = shard_of(model_param)
        if shard.dtype == torch.bfloat16 and isinstance(tensors.get("param"), torch.Tensor):
            weights, rest = split_weights(tensors["param"].to(shard.device).contiguous())
            with torch.no_grad():
                shard.copy_(weights.view(shard.shape))
            tensors = {**tensors, "param": rest.view(shard.shape)}
        plain_set(model_param, tensors)

    part._get_main_param_and_optimizer_states = MethodType(get, part)
    part._set_main_param_and_optimizer_states = MethodType(put, part)
    part.init_state_fn = _initialise
    # Transformer Engine's own makes an fp32 copy of all state; megatron-core takes only the groups from it.
    part.optimizer.state_dict = MethodType(torch.optim.Optimizer.state_dict, part.optimizer)


def _initialise(adam: Any, _: object = None) -> None:
    """Zero moments, and main weights equal to the bf16 ones.

    megatron-core calls ``initialize_state`` without its second argument.
    """
    for group in adam.param_groups:
        for param in group["params"]:
            if not adam.state[param]:
                adam.initialize_state(param, adam.store_param_remainders and param.dtype == torch.bfloat16)
