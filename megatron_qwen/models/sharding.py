"""Global names, shapes and offsets of a rank's parameters.

megatron-core's sharded state dict maps each local tensor to a slice of a global tensor. Whatever must not depend on the
layout (initial weights, exports, comparisons) uses these names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.hf.adapters import ADAPTERS

# With this metadata megatron-core gives a tensor the same global name under every layout.
CHECKPOINT_METADATA: dict[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # One rank of a data-parallel group gathers the optimizer's state over gloo, not each of them over NCCL.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass(frozen=True)
class Slice:
    """A local tensor and its offset in the global tensor ``name``.

    Args:
        name: such as ``decoder.layers.self_attention.linear_qkv.weight``; layers and experts are leading dimensions.
        data: the local values, without those leading dimensions of size one.
        leading: index in the leading (layer, expert) dimensions.
        global_shape: shape of the rest of the global tensor.
        offset: of the local values in the rest.
        is_main_replica: whether this rank is replica 0 of the ranks that hold the same values.
    """

    name: str
    data: torch.Tensor
    leading: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_main_replica: bool


def sharded_state_dict(modules: Sequence[GPTModel], groups: ProcessGroupCollection) -> dict[str, Any]:
    """megatron-core's sharded state dict of this rank's chunks, by ``model``, or ``model{i}`` where it has several."""
    metadata = {**CHECKPOINT_METADATA, "dp_cp_group": groups.dp_cp}
    if len(modules) == 1:
        return {"model": modules[0].sharded_state_dict(metadata=metadata)}
    return {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(modules)}


def trained_only(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state dict without frozen weights; what modules save beside weights stays."""
    return _chosen(state, lambda _, value: not isinstance(value, torch.nn.Parameter) or value.requires_grad)


def without_adapters(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state dict as the model has it that the adapters are for."""
    return _chosen(state, lambda key, _: f"{ADAPTERS}." not in key)


def _chosen(state: dict[str, Any], keep: Callable[[str, Any], bool]) -> dict[str, Any]:
    return {
        model: {key: entry for key, entry in entries.items() if keep(key, getattr(entry, "data", None))}
        for model, entries in state.items()
    }


def slices(modules: Sequence[GPTModel], groups: ProcessGroupCollection) -> Iterator[Slice]:
    """Every parameter slice that this rank holds, as views: writing to ``data`` writes to the parameter."""
    for state in sharded_state_dict(modules, groups).values():
        tensors = {
            key: value for key, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        apply_factories(tensors)
        yield from _walk(tensors)


def _walk(node: Any) -> Iterator[Slice]:
    if isinstance(node, ShardedTensor):
        yield _slice(node)
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _walk(child)


def _slice(tensor: ShardedTensor) -> Slice:
    axes = tensor.prepend_axis_num
    assert tensor.data is not None
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return Slice(
        name=tensor.key,
        data=tensor.data,
        leading=tuple(tensor.global_offset[:axes]),
        global_shape=tuple(tensor.global_shape[axes:]),
        offset=tuple(tensor.global_offset[axes:]),
        is_main_replica=not any(replica),
    )
