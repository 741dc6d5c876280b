"""A collective of a group of one rank, in place, costs nothing.

Replaces: ``torch.distributed.all_gather_into_tensor`` and ``reduce_scatter_tensor``, where the group has one rank and
    input and output are the same memory: there is nothing to do. All others go to torch as before.
Needed: with every torch so far (2.15 too): gloo copies the whole buffer even then. For a single rank with one gradient
    buffer that was most of the time spent in megatron-core's data parallelism.
When: before megatron.core is imported (it binds both names), on processes without a GPU.
Can go: when gloo returns at once for a group of one, or megatron-core skips such collectives.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.core_patches.replacement import wrap


def apply() -> None:
    """Wraps both, each once."""
    wrap(dist, "all_gather_into_tensor", _free_for_one)
    wrap(dist, "reduce_scatter_tensor", _free_for_one)


def _free_for_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = dist.get_world_size(kwargs.get("group")) == 1
        if alone and output.data_ptr() == input.data_ptr() and output.numel() == input.numel():
            return Done() if kwargs.get("async_op") else None
        return collective(output, input, *args, **kwargs)

    return call


class Done:
    """Handle of a collective that is over."""

    def wait(self, timeout: object = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True
