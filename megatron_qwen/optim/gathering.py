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

    What it returns is the core's but for padding, and each rank has only the kinds of state that it gathered: who
    saves them must not go by the core's rule that rank 0 has all (checkpoint/optimizer_state.py).

    Args:
        part: a DistributedOptimizer.
    """
    plain = part.get_parameter_state_dp_zero

    def gathered(
        _: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        if not use_gloo_comm or empty_data or return_on_all_ranks:
            answer: dict[Any, Any] | None = plain(use_gloo_comm, empty_data, return_on_all_ranks)
            return answer
        return _gathered(part)

    part.get_parameter_state_dp_zero = MethodType(gathered, part)


def _gathered(part: Any) -> dict[Any, Any]:
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(part.gbuf_ranges):
        state[index] = {dtype: _buffer(part, part.buffers[index], buckets) for dtype, buckets in ranges.items()}
    return state


def _buffer(part: Any, buffer: Any, buckets: list[Any]) -> dict[str, Any]:
    """State of a buffer's parameters, end to end and without padding: of the kinds that this rank gathers."""
    group = part.data_parallel_group_gloo
    ranks, members = group.size(), dist.get_process_group_ranks(group)
    keys = ("param", *part.optimizer_state_keys)
    # Rank 0 writes the weights as well.
    roots = {key: (1 + number) % ranks for number, key in enumerate(keys)}
    sizes = [bucket.grad_data.numel() for bucket in buffer.buckets]
    # A bucket's padding lies where the next bucket begins, and is overwritten by it.
    room = buffer.numel_unpadded + max(sizes)
    mine = [key for key in keys if roots[key] == group.rank()]
    whole = {key: torch.empty(room, dtype=torch.float32, device="cpu") for key in mine}
    offset = 0
    for bucket, size, content in zip(buffer.buckets, sizes, buckets, strict=True):
        shards = _local_shards(part, content["param_map"], size // ranks, keys)
        messages = [
            dist.gather(
                shards[key],
                list(whole[key][offset : offset + size].chunk(ranks)) if key in whole else None,
                members[roots[key]],
                group,
                async_op=True,
            )
            for key in keys
        ]
        for message in messages:
            assert message is not None  # as for a rank outside of the group
            message.wait()
        offset += bucket.numel_unpadded
    return {**{key: tensor[: buffer.numel_unpadded] for key, tensor in whole.items()}, "numel_unpadded": offset}


def _local_shards(part: Any, parameters: dict[Any, Any], size: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """This rank's share of a bucket, by kind of state, on the host."""
    shards = {key: torch.empty(size, dtype=torch.float32, device="cpu") for key in keys}
    for parameter, places in parameters.items():
        tensors, place = part._get_main_param_and_optimizer_states(parameter), places["gbuf_local"]
        for key, shard in shards.items():
            shard[place.start : place.end].copy_(tensors[key].detach().view(-1))
    return shards
