"""Cross-entropy of the output layer without ever holding all logits.

The tokens pass in chunks: logits, their log-sum-exp over the tensor-parallel vocabulary shards, and in training
at once the gradients for the hidden states and the output weight. What lives on is two gradients instead of
logits and probabilities of every token (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989,
here with the vocabulary split over ranks). Padded vocabulary rows take no part.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection


def output_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    groups: ProcessGroupCollection,
    sequence_parallel: bool,
    vocab_size: int,
    chunk_tokens: int,
) -> torch.Tensor:
    """Sum over tokens of mask x cross-entropy, the same on every TP rank.

    Args:
        hidden: output of the last layer, [s, b, h], or [s / TP, b, h] under sequence parallelism.
        weight: this rank's rows of the output matrix, [padded vocabulary / TP, h].
        labels: next tokens, [b, s].
        mask: weight of each token's loss, [b, s].
        groups: ``tp`` is used.
        sequence_parallel: whether ``hidden`` is split over the TP ranks.
        vocab_size: rows that are no padding.
        chunk_tokens: tokens at once.

    Returns:
        A scalar in fp32.
    """
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=groups.tp)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=groups.tp)
    rows = weight.shape[0]
    valid = min(max(vocab_size - rows * groups.tp.rank(), 0), rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, weights = labels.t().reshape(-1), mask.t().reshape(-1).float()
    return _ChunkedCrossEntropy.apply(flat, weight, targets, weights, groups.tp, valid, chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [n, h], weight [v / TP, h], targets [n], weights [n] -> scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        group: dist.ProcessGroup,
        valid: int,
        chunk: int,
    ) -> torch.Tensor:
        training = hidden.requires_grad or weight.requires_grad
        first_row = weight.shape[0] * group.rank()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if training else None
        for begin in range(0, hidden.shape[0], chunk):
            span = slice(begin, begin + chunk)
            logits = (hidden[span] @ weight.t()).float()
            if valid < logits.shape[1]:
                logits[:, valid:] = float("-inf")
            local = targets[span] - first_row
            mine = (local >= 0) & (local < valid)
            index = local.clamp(0, max(valid - 1, 0))
            loss, exponentials, sums = _chunk_loss(logits, index, mine, group)
            total += torch.dot(loss, weights[span])
            if grad_hidden is None or grad_weight is None:
                continue
            gradient = exponentials.mul_((weights[span] / sums).unsqueeze(1))
            gradient[torch.arange(len(index), device=index.device), index] -= mine * weights[span]
            gradient = gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=grad_hidden[span])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.t(), hidden[span])
            else:
                grad_weight += gradient.t() @ hidden[span]
        if training:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), *[None] * 5


def _chunk_loss(
    logits: torch.Tensor, index: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [n], exp(logits - max) in place of the logits [n, v / TP], and their sums over the whole vocabulary [n]."""
    spread = group.size() > 1
    largest = logits.amax(dim=1)
    if spread:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(largest.unsqueeze(1))
    target = logits.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill_(~mine, 0.0)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1)
    if spread:
        both = torch.stack((sums, target))
        dist.all_reduce(both, group=group)
        sums, target = both.unbind()
    return sums.log() - target, exponentials, sums
