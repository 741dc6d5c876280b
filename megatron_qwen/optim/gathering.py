"""The optimizer's state of all data-parallel ranks in whole tensors, as a checkpoint wants it.

megatron-core gathers everything on one rank, which then also writes everything: it fills buffers with zeros, receives
into others, joins those and copies the result, and the step that a save holds up waits for all of it. Here each kind of
state (main weights, first and second moments) goes to a rank of its own, at once and into place.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist


def gather_in_place(part: Any) -> None:
    """Gives one of the core's distributed optimizers the faster way.

    Each rank has only the kinds of state that it gathered: who saves them must not go by the core's rule that rank 0
    has all (checkpoint/optimizer_state.py). And buckets lie where the parameters' places count from, padding included;
    0.19.2's own leaves the padding out between buckets and then cuts parameters at places that count it, so that
    with several buckets main weights and moments are saved shifted.

    Args:
        part: a DistributedOptimizer.
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
    """Room for every kind of state on every rank: what a checkpoint is loaded into."""
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
    """State of a buffer's parameters, each in its place in the buffer: of the kinds that this rank gathers."""
    group = part.data_parallel_group_gloo
    ranks, members = group.size(), dist.get_process_group_ranks(group)
    keys = ("param", *part.optimizer_state_keys)
    # Rank 0 writes the weights as well.
    roots = {key: (1 + number) % ranks for number, key in enumerate(keys)}
    mine = [key for key in keys if roots[key] == group.rank()]
    whole = {key: torch.empty(buffer.numel, dtype=torch.float32, device="cpu") for key in mine}
    for bucket, content in zip(buffer.buckets, buckets, strict=True):
        size = bucket.grad_data.numel()
        shards = _local_shards(part, content["param_map"], size // ranks, keys)
        messages = [
            dist.gather(
                shards[key],
                list(whole[key][bucket.offset : bucket.offset + size].chunk(ranks)) if key in whole else None,
                members[roots[key]],
                group,
                async_op=True,
            )
            for key in keys
        ]
        for message in messages:
            assert message is not None  # as for a rank outside of the group
            message.wait()
    return whole


def _local_shards(part: Any, parameters: dict[Any, Any], size: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """This rank's share of a bucket, by kind of state, on the host."""
    shards = {key: torch.empty(size, dtype=torch.float32, device="cpu") for key in keys}
    for parameter, places in parameters.items():
        tensors, place = part._get_main_param_and_optimizer_states(parameter), places["gbuf_local"]
        for key, shard in shards.items():
            shard[place.start : place.end].copy_(tensors[key].detach().view(-1))
    return shards
