"""Gathers the optimizer state of all data-parallel ranks into whole tensors for a checkpoint.

Replaces: ``DistributedOptimizer.get_parameter_state_dp_zero`` of ``megatron.core.optimizer.distrib_optimizer``, for the
    gather over gloo (models/sharding.py asks for it). Each kind of state (main weights, first and second moments) goes
    to a rank of its own, at once and into place. Each rank then has only the kinds that it gathered: who saves them
    must not go by megatron-core's rule that rank 0 has all (checkpoint/optimizer_state.py).
Needed: with megatron-core 0.19.2, for two reasons. It leaves the padding at the ends of buckets out, and then cuts
    parameters at places that count it, so that with several buckets main weights and moments are saved shifted. And it
    gathers everything on one rank, which then also writes everything: it fills buffers with zeros, receives into
    others, joins those and copies the result, while the step that the save holds up waits.
When: after megatron.core is imported, on every process.
Upstream: NVIDIA/Megatron-LM pull request 5077 (merged, not in 0.19.2) mends the places by counting them without the
    padding; 5255 (closed) gathered into place.
Can go: it must go, or leave the padding out, with the first version that has 5077, for which the places below would be
    wrong; its test fails then.
"""

from typing import Any

import torch
import torch.distributed as dist


def apply() -> None:
    """Replaces the method; what is replaced is the same after every call."""
    from megatron.core.optimizer import distrib_optimizer

    optimizer: Any = distrib_optimizer.DistributedOptimizer
    optimizer.get_parameter_state_dp_zero = gathered_state


def gathered_state(
    self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any]:
    """State by buffer, format and kind, [buffer's elements] each; buckets lie where parameters' places count from.

    Args:
        self: a DistributedOptimizer.
        use_gloo_comm: must be true, unless ``empty_data``.
        empty_data: room for every kind on every rank, which a checkpoint is loaded into.
        return_on_all_ranks: must be false, unless ``empty_data``.
    """
    if empty_data:
        return _empty(self)
    assert use_gloo_comm, "models/sharding.py asks for it"
    assert not return_on_all_ranks
    return _gathered(self)


def _empty(part: Any) -> dict[Any, Any]:
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(part.gbuf_ranges):
        room = part.buffers[index].numel
        keys = ("param", *part.optimizer_state_keys)
        state[index] = {
            dtype: {key: torch.empty(room, dtype=torch.float32, device="cpu") for key in keys} for dtype in ranges
        }
    return state


def _gathered(part: Any) -> dict[Any, Any]:
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(part.gbuf_ranges):
        state[index] = {dtype: _buffer(part, part.buffers[index], buckets) for dtype, buckets in ranges.items()}
    return state


def _buffer(part: Any, buffer: Any, buckets: list[Any]) -> dict[str, Any]:
    """Whole fp32 buffers, [buffer.numel] on the host, of the kinds of state that this rank gathers."""
    group = part.data_parallel_group_gloo
    ranks, members = group.size(), dist.get_process_group_ranks(group)
    keys = ("param", *part.optimizer_state_keys)
    # Start at rank 1: rank 0 already writes the model weights.
    roots = {key: (1 + number) % ranks for number, key in enumerate(keys)}
    mine = [key for key in keys if roots[key] == group.rank()]
    whole = {key: torch.empty(buffer.numel, dtype=torch.float32, device="cpu") for key in mine}
    for bucket, content in zip(buffer.buckets, buckets, strict=True):
        size = bucket.grad_data.numel()
        shards = _local_shards(part, content["param_map"], size // ranks, keys)
        gathers = [
            dist.gather(
                shards[key],
                list(whole[key][bucket.offset : bucket.offset + size].chunk(ranks)) if key in whole else None,
                members[roots[key]],
                group,
                async_op=True,
            )
            for key in keys
        ]
        for pending in gathers:
            assert pending is not None  # as for a rank outside of the group
            pending.wait()
    return whole


def _local_shards(part: Any, parameters: dict[Any, Any], size: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """This rank's shard of a bucket for each kind of state: fp32, [size], on the host."""
    shards = {key: torch.empty(size, dtype=torch.float32, device="cpu") for key in keys}
    for parameter, places in parameters.items():
        tensors, place = part._get_main_param_and_optimizer_states(parameter), places["gbuf_local"]
        for key, shard in shards.items():
            shard[place.start : place.end].copy_(tensors[key].detach().view(-1))
    return shards
