"""Cross-entropy of the output layer without ever holding all logits.

The loss is computed in chunks of tokens: logits, their log-sum-exp over the tensor-parallel vocabulary shards, and in
training immediately the gradients of the hidden states and of the output weight. So the forward pass saves two
gradients instead of logits and probabilities of every token: at a vocabulary of 152,064, the logits of 4096 tokens take
1.2 GB in bf16. This is the idea of Liger's fused linear cross-entropy (arXiv 2410.10989), extended to a vocabulary that
is split over ranks. Padded vocabulary rows take no part. On a GPU, two kernels process the logits (loss_kernels.py).
"""

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.models.torch_backend import dense_gemm, formulas
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

# Logits per block on a CPU: 4 MiB in fp32, which stay in its cache between the passes of plain torch.
_BLOCK_ELEMENTS = 1 << 20


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
        vocab_size: rows without padding.
        chunk_tokens: tokens per chunk.

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
    training = torch.is_grad_enabled()  # read here: inside an autograd Function it is always off
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(
        flat, weight, targets, weights, groups.tp, valid, chunk_tokens, training
    )
    return loss


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
        training: bool,
    ) -> torch.Tensor:
        first_row = weight.shape[0] * group.rank()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if training else None
        # The gradients of several bf16 chunks are summed in fp32. One chunk needs no sum: its GEMM rounds once.
        whole = weight.dtype != torch.float32 and hidden.shape[0] <= chunk
        grad_weight = None
        if training and not whole:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, hidden.shape[0], chunk):
            span = slice(begin, begin + chunk)
            local = targets[span] - first_row
            mine = (local >= 0) & (local < valid)
            target = _Target(local.clamp(0, max(valid - 1, 0)), mine, weights[span], valid, group)
            loss, gradient = _chunk_loss(dense_gemm.linear(hidden[span], weight), target, with_gradient=training)
            total += torch.dot(loss, weights[span])
            if grad_hidden is None or gradient is None:
                continue
            dense_gemm.linear(gradient, weight.t(), out=grad_hidden[span])
            if grad_weight is None:
                grad_weight = gradient.t() @ hidden[span]
            elif weight.dtype == torch.float32:
                dense_gemm.add_weight_gradient_(grad_weight, gradient, hidden[span])
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
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), *[None] * 6


@dataclass(frozen=True)
class _Target:
    """Targets of the rows of a chunk.

    Args:
        index: column of the target in this rank's vocabulary shard, [n]; any valid column where it is in another shard.
        mine: whether the target is in this rank's shard, [n].
        weights: of each row's loss, [n].
        valid: columns of this shard without padding.
        group: ranks that share the vocabulary.
    """

    index: torch.Tensor
    mine: torch.Tensor
    weights: torch.Tensor
    valid: int
    group: dist.ProcessGroup

    def rows(self, span: slice) -> "_Target":
        """The same of some rows."""
        return replace(self, index=self.index[span], mine=self.mine[span], weights=self.weights[span])


def _chunk_loss(
    logits: torch.Tensor, target: _Target, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of each row, [n], and the gradient of the weighted sum for the logits, [n, v / TP], in their format."""
    if logits.is_cuda and importlib.util.find_spec("triton") is not None:
        from megatron_qwen.models.loss_kernels import loss_and_gradient

        losses = loss_and_gradient(
            logits,
            target.index,
            target.mine,
            target.weights,
            valid=target.valid,
            group=target.group,
            with_gradient=with_gradient,
        )
        return losses, logits if with_gradient else None
    # With a split vocabulary, one all-reduce per chunk; without, smaller blocks that stay in a CPU's cache.
    alone = target.group.size() == 1 and not logits.is_cuda
    block = max(1, _BLOCK_ELEMENTS // logits.shape[1]) if alone else len(logits)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for begin in range(0, len(logits), block):
        span = slice(begin, begin + block)
        losses[span] = _block_loss(logits[span], target.rows(span), with_gradient=with_gradient)
    return losses, logits if with_gradient else None


def _block_loss(logits: torch.Tensor, target: _Target, *, with_gradient: bool) -> torch.Tensor:
    """Loss of each row, [n]; overwrites the logits, [n, v / TP], by their gradient."""
    alone = with_gradient and target.group.size() == 1
    if alone and (kernel := PROCESS_KERNELS.of(formulas.loss_and_gradient_)):
        return kernel(logits, target.index, target.mine, target.weights, target.valid)
    wide = logits.float()
    if target.valid < wide.shape[1]:
        wide[:, target.valid :] = float("-inf")
    losses, exponentials, sums = _softmax_parts(wide, target)
    if with_gradient:
        exponentials.mul_((target.weights / sums).unsqueeze(1))
        rows = torch.arange(len(target.index), device=logits.device)
        exponentials[rows, target.index] -= target.mine * target.weights
        if wide.dtype != logits.dtype:
            logits.copy_(exponentials)
    return losses


def _softmax_parts(logits: torch.Tensor, target: _Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [n], exp(logits - max) in place of the logits [n, v / TP], and their sums over the whole vocabulary [n]."""
    spread = target.group.size() > 1
    largest = logits.amax(dim=1)
    if spread:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=target.group)
    logits.sub_(largest.unsqueeze(1))
    chosen = logits.gather(1, target.index.unsqueeze(1)).squeeze(1).masked_fill_(~target.mine, 0.0)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1)
    if spread:
        both = torch.stack((sums, chosen))
        dist.all_reduce(both, group=target.group)
        sums, chosen = both.unbind()
    return sums.log() - chosen, exponentials, sums
