"""The precision-aware optimizer's main weights in a checkpoint: fp32 on disk, 16-bit remainders in memory.

With ``precision.use_precision_aware_optimizer``, Transformer Engine's Adam stores no fp32 main weights: it stores the
16 bits of each that the bf16 weight lacks (the remainder). megatron-core 0.19.2 saves these remainders in the place of
the main weights, which no other optimizer can read and which its own load rejects. Here remainders and bf16 weights are
joined to fp32 on save and split on load, so that a checkpoint does not depend on the optimizer that wrote it.

A weight exactly between two bf16 numbers is rounded up here and to even elsewhere. After a load from another optimizer,
data-parallel ranks may therefore differ in such weights (one in some 130,000) until the first update gathers them.
"""

from types import MethodType
from typing import Any

import torch


def join_main_weights(weights: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """fp32 main weights of the shape of ``weights``, exact to the bit.

    Args:
        weights: bf16.
        remainder: lower 16 bits of each main weight, int16, of the same shape.
    """
    # Transformer Engine rounds to nearest (multi_tensor/adam.cu): it adds 1 to the upper half where the lower one, read
    # as a signed number, is negative. Undo that before joining the halves.
    upper = weights.view(torch.int16).int() - (remainder < 0).int()
    return ((upper << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def split_main_weights(main: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 weights and int16 remainders of the shape of ``main``; the inverse of ``join_main_weights``.

    Args:
        main: fp32 main weights, contiguous.
    """
    bits = main.view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower 16 bits, as they are
    upper = ((bits >> 16) + (remainder < 0).int()).to(torch.int16)
    return upper.view(torch.bfloat16), remainder


def save_main_weights_in_fp32(part: Any) -> None:
    """Replaces the methods of a distributed optimizer that read and write its state for a checkpoint.

    Args:
        part: megatron-core's DistributedOptimizer around FusedAdam with use_precision_aware_optimizer.
    """
    plain_get, plain_set = part._get_main_param_and_optimizer_states, part._set_main_param_and_optimizer_states

    def shard_of(model_param: torch.Tensor) -> torch.Tensor:
        group, order = part.model_param_group_index_map[model_param]
        shard: torch.Tensor = part.optimizer.param_groups[group]["params"][order]
        return shard

    def get(_: Any, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = plain_get(model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = join_main_weights(shard_of(model_param).detach(), tensors["param"])
        return tensors

    def put(_: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        shard = shard_of(model_param)
        if shard.dtype == torch.bfloat16 and isinstance(tensors.get("param"), torch.Tensor):
            weights, remainder = split_main_weights(tensors["param"].to(shard.device).contiguous())
            with torch.no_grad():
                shard.copy_(weights.view(shard.shape))
            tensors = {**tensors, "param": remainder.view(shard.shape)}
        plain_set(model_param, tensors)

    part._get_main_param_and_optimizer_states = MethodType(get, part)
    part._set_main_param_and_optimizer_states = MethodType(put, part)
    part.init_state_fn = _initialise
    # FusedAdam.state_dict makes an fp32 copy of all state, which could exceed the device's memory; megatron-core reads
    # only the parameter groups of the result.
    part.optimizer.state_dict = MethodType(torch.optim.Optimizer.state_dict, part.optimizer)


def _initialise(adam: Any, _: object = None) -> None:
    """Zero moments, and zero remainders: main weights equal to the bf16 weights.

    megatron-core calls ``initialize_state`` without ``store_param_remainders``, which Transformer Engine 2.20 requires.
    """
    for group in adam.param_groups:
        for param in group["params"]:
            if not adam.state[param]:
                adam.initialize_state(param, adam.store_param_remainders and param.dtype == torch.bfloat16)
