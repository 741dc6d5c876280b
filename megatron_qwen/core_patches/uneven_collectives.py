"""all_gather and reduce_scatter over gloo take pieces of unequal size.

Replaces: ``torch.distributed.all_gather`` and ``reduce_scatter``. Pieces of one size go to torch as before. Others are
    padded to the longest for all_gather; reduce_scatter becomes an all_reduce of which each rank keeps its rows.
Needed: with every torch so far (2.15 too). megatron-core 0.19.2 gathers the tokens of experts this way under expert
    tensor parallelism, where ranks hold different numbers of tokens; NCCL takes them.
When: before megatron.core is imported, on processes without a GPU.
Upstream: pytorch/pytorch issue 156627 (open).
Can go: when gloo's all_gather and reduce_scatter take uneven pieces.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.core_patches.replacement import wrap


def apply() -> None:
    """Wraps both, each once."""
    wrap(dist, "all_gather", _padding)
    wrap(dist, "reduce_scatter", _reducing_all)


def _padding(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def all_gather(outputs: list[torch.Tensor], piece: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        longest = max(output.shape[0] if output.dim() else 1 for output in outputs)
        if all(output.shape == piece.shape for output in outputs):
            return plain(outputs, piece, group=group, async_op=async_op)
        assert not async_op
        padded = piece.new_zeros((longest, *piece.shape[1:]))
        padded[: piece.shape[0]] = piece
        gathered = [torch.empty_like(padded) for _ in outputs]
        plain(gathered, padded, group=group)
        for output, whole in zip(outputs, gathered, strict=True):
            output.copy_(whole[: output.shape[0]])
        return None

    return all_gather


def _reducing_all(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def reduce_scatter(
        output: torch.Tensor,
        pieces: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(piece.shape == output.shape for piece in pieces):
            return plain(output, pieces, op=op, group=group, async_op=async_op)
        assert not async_op
        whole = torch.cat(pieces)
        dist.all_reduce(whole, op=op, group=group)
        start = sum(piece.shape[0] for piece in pieces[: dist.get_rank(group)])
        output.copy_(whole[start : start + output.shape[0]])
        return None

    return reduce_scatter
