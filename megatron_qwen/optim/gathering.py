"""Gathers the optimizer state of all data-parallel ranks into whole tensors for a checkpoint.

megatron-core gathers all state on data-parallel rank 0, which then also writes all of it. It zero-fills buffers,
receives into others, concatenates those and copies the result, and training waits for all of these copies. Here each
kind of state (main weights, first moments, second moments) is gathered on a rank of its own: the three gathers run at
the same time, receive directly into the final buffer, and three ranks write.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist


def gather_in_place(part: Any) -> None:
    """Replaces ``get_parameter_state_dp_zero`` of a distributed optimizer by a gather in place.

    Two differences from megatron-core 0.19.2:

    - A rank has only the kinds of state that it gathered. Code that saves them must not assume that rank 0 has all
      (checkpoint/optimizer_state.py).
    - The padding between buckets is part of the result, because the offsets of the parameters count it. megatron-core
      drops the padding and then cuts at those offsets: with several buckets it saves shifted main weights and moments.

    Args:
        part: megatron-core's DistributedOptimizer.
    """

    def gathered(
        _: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        if empty_data:
            return _empty(part)
        assert use_gloo_comm, "models/sharding.py asks for it"
        assert not return_on_all_ranks
        return _gathered(part)

    part.get_parameter_state_dp_zero = MethodType(gathered, part)


def _empty(part: Any) -> dict[Any, Any]:
    """Uninitialised buffers for every kind of state on every rank, into which a checkpoint is loaded."""
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
        for gather in gathers:
            assert gather is not None  # None only on a rank outside the group
            gather.wait()
    return whole


def _local_shards(part: Any, parameters: dict[Any, Any], size: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """This rank's shard of a bucket for each kind of state: fp32, [size], on the host."""
    shards = {key: torch.empty(size, dtype=torch.float32, device="cpu") for key in keys}
    for parameter, places in parameters.items():
        tensors, place = part._get_main_param_and_optimizer_states(parameter), places["gbuf_local"]
        for key, shard in shards.items():
            shard[place.start : place.end].copy_(tensors[key].detach().view(-1))
    return shards
