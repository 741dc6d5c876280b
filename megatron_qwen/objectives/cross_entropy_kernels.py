"""Cross-entropy of a chunk of logits on a GPU: two Triton kernels; the gradient overwrites the logits.

Plain torch needs some ten passes over the logits in fp32. Here the first kernel reads them once in their own dtype (the
online softmax of Milakov and Gimelshein, arXiv 1805.02867), and the second reads them again and writes the gradient in
their place.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

# Triton interprets the annotations of a kernel's arguments, and accepts only its own.
# ruff: noqa: ANN001, ANN202

# A program processes a row in blocks: 8192 logits over 16 warps of 32 threads are 16 logits per thread, which fit its
# registers in fp32. Chosen by hand; other sizes were not measured.
_BLOCK = 8192
_WARPS = 16


def loss_and_gradient(
    logits: torch.Tensor,
    index: torch.Tensor,
    mine: torch.Tensor,
    weights: torch.Tensor,
    *,
    valid: int,
    group: dist.ProcessGroup,
    with_gradient: bool,
) -> torch.Tensor:
    """Cross-entropy of every row. With a gradient, the logits are overwritten by weights x (softmax - one-hot).

    Args:
        logits: this rank's columns, [n, v / TP], contiguous; overwritten.
        index: column of the row's target in this rank's vocabulary shard, [n]; any valid column where it is in another.
        mine: whether the target is in this rank's shard, [n].
        weights: of each row's loss, fp32, [n].
        valid: columns of this shard without padding.
        group: tensor-parallel ranks, which share the vocabulary.
        with_gradient: whether to write the gradient.

    Returns:
        Loss of each row in nats, fp32, [n], without its weight.
    """
    rows, columns = logits.shape
    largest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums, target = torch.empty_like(largest), torch.empty_like(largest)
    column = torch.where(mine, index, -1)
    statistics: Any = _statistics
    statistics[(rows,)](logits, column, largest, sums, target, logits.stride(0), valid, BLOCK=_BLOCK, num_warps=_WARPS)
    if group.size() > 1:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        both = torch.stack((sums * torch.exp(own - largest), target))
        dist.all_reduce(both, group=group)
        sums, target = both.unbind()
    log_sum = sums.log().add_(largest)
    if with_gradient:
        gradient: Any = _gradient
        gradient[(rows,)](
            logits, column, weights, log_sum, logits.stride(0), columns, valid, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return log_sum - target


@triton.jit
def _statistics(logits, column, largest, sums, target, stride, valid, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest logit of a row, sum of exp(logit - largest), and the target's logit (0 where it is in another shard)."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    high = float("-inf")
    total = 0.0
    for first in range(0, valid, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(line + at, mask=at < valid, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(x, axis=0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(x - higher), axis=0)
        high = higher
    own = tl.load(column + row)
    tl.store(largest + row, high)
    tl.store(sums + row, total)
    tl.store(target + row, tl.load(line + own, mask=own >= 0, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits, column, weights, log_sum, stride, columns, valid, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """weight x (softmax - one-hot) in place of each logit, softmax = exp(logit - log-sum-exp); 0 in the padding."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    own = tl.load(column + row)
    weight = tl.load(weights + row)
    shift = tl.load(log_sum + row)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(line + at, mask=at < valid, other=float("-inf")).to(tl.float32)
        slope = weight * (tl.exp(x - shift) - tl.where(at == own, 1.0, 0.0))
        tl.store(line + at, slope.to(logits.dtype.element_ty), mask=at < columns)
