"""Cross-entropy and log-probabilities of the output layer without ever holding all logits.

Both work in chunks of tokens: logits, and their log-sum-exp over the tensor-parallel vocabulary shards. The
cross-entropy computes in training immediately the gradients of the hidden states and of the output weight. So the
forward pass saves two gradients instead of logits and probabilities of every token: at a vocabulary of 152,064, the
logits of 4096 tokens take 1.2 GB in bf16. This is the idea of Liger's fused linear cross-entropy (arXiv 2410.10989),
extended to a vocabulary that is split over ranks. Log-probabilities save the hidden states and compute the logits again
in the backward pass, because the weight of each token is known only there. Padded vocabulary rows take no part. On a
GPU, two kernels process the logits (cross_entropy_kernels.py).
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.models.torch_backend import dense_gemm, formulas
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

# Logits per block on a CPU: 4 MiB in fp32, which stay in its cache between the passes of plain torch.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LogitLayout:
    """How logits are divided: over ranks by vocabulary, and on each rank into chunks of tokens.

    Args:
        group: ranks that share the vocabulary, in order of their rows.
        vocab_size: rows of the output matrix without padding.
        chunk_tokens: tokens whose logits are held at a time.
    """

    group: dist.ProcessGroup
    vocab_size: int
    chunk_tokens: int

    def block_rows(self, weight: torch.Tensor) -> int:
        """Rows whose logits are processed at a time on a CPU with the whole vocabulary, else 1."""
        alone = self.group.size() == 1 and not weight.is_cuda
        return max(1, _BLOCK_ELEMENTS // weight.shape[0]) if alone else 1

    def chunks(
        self, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> Iterator[tuple[slice, "_Target"]]:
        """The chunks of tokens with what each is to predict."""
        for begin in range(0, len(targets), self.chunk_tokens):
            span = slice(begin, begin + self.chunk_tokens)
            yield span, self.target(weight.shape[0], targets[span], weights[span])

    def target(self, rows: int, targets: torch.Tensor, weights: torch.Tensor) -> "_Target":
        """What some tokens are to predict, for a rank with so many rows of the output matrix."""
        first_row = rows * self.group.rank()
        valid = min(max(self.vocab_size - first_row, 0), rows)
        local = targets - first_row
        mine = (local >= 0) & (local < valid)
        return _Target(local.clamp(0, max(valid - 1, 0)), mine, weights, valid, self.group)


def weighted_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, layout: LogitLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight x cross-entropy over all rows, and the cross-entropy of each; the same on every rank of the group.

    Args:
        hidden: [n, h]; the gradient that it gets is this rank's part, to be summed over the group.
        weight: this rank's rows of the output matrix, [padded vocabulary / TP, h].
        targets: [n].
        weights: of each row's loss, fp32, [n]; they get no gradient.
        layout: of the logits.

    Returns:
        A scalar and [n] in fp32; the second has no gradient.
    """
    training = torch.is_grad_enabled()  # read here: inside an autograd Function it is always off
    found: tuple[torch.Tensor, torch.Tensor] = _WeightedCrossEntropy.apply(
        hidden, weight, targets, weights, layout, training
    )
    return found


def with_weight(
    hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows that have a weight, filled by rows of weight 0 to a multiple; all where these would not be fewer.

    With ``multiple`` the rows of a block, compiled kernels meet few shapes, however many tokens of a batch carry loss.

    Args:
        hidden: [n, h].
        targets: [n].
        weights: [n].
        multiple: that the number of rows is one of.
    """
    (kept,) = weights.nonzero(as_tuple=True)
    number = -(-max(len(kept), 1) // multiple) * multiple
    if number >= len(weights):
        return hidden, targets, weights
    index = torch.zeros(number, dtype=torch.int64, device=hidden.device)
    index[: len(kept)] = kept
    factors = torch.zeros(number, dtype=weights.dtype, device=weights.device)
    factors[: len(kept)] = weights[kept]
    return hidden.index_select(0, index), targets[index], factors


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, layout: LogitLayout) -> torch.Tensor:
    """Log-probability of each row's target in fp32, [n]; arguments as in ``weighted_cross_entropy``."""
    found: torch.Tensor = _LogProbs.apply(hidden, weight, targets, layout)
    return found


def log_probs_of_logits(logits: torch.Tensor, targets: torch.Tensor, layout: LogitLayout) -> torch.Tensor:
    """The bits of ``log_probs`` from logits that are there, without a gradient.

    Args:
        logits: of this rank's rows of the vocabulary, [n, padded vocabulary / TP]; overwritten.
        targets: [n].
        layout: of the logits; not cut into chunks here.
    """
    nothing = torch.zeros(len(targets), dtype=torch.float32, device=logits.device)  # weights are not read
    losses, _ = _chunk_loss(logits, layout.target(logits.shape[1], targets, nothing), with_gradient=False)
    return -losses


class _WeightedCrossEntropy(torch.autograd.Function):
    """hidden [n, h], weight [v / TP, h], targets [n], weights [n] -> scalar, and [n] without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        layout: LogitLayout,
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        frozen = not ctx.needs_input_grad[1]
        gradients = _Gradients(hidden, weight, layout.chunk_tokens, frozen=frozen) if training else None
        for span, target in layout.chunks(weight, targets, weights):
            loss, gradient = _chunk_loss(dense_gemm.linear(hidden[span], weight), target, with_gradient=training)
            total += torch.dot(loss, weights[span])
            losses[span] = loss
            if gradients is not None and gradient is not None:
                gradients.add(span, gradient)
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        scaled = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), scaled, *[None] * 4


class _LogProbs(torch.autograd.Function):
    """hidden [n, h], weight [v / TP, h], targets [n] -> [n].

    With g the gradient of the log-probabilities, the gradient of the logits is that of the cross-entropy with the
    weights -g.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, layout: LogitLayout
    ) -> torch.Tensor:
        found = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        # Without a gradient the weights are not read.
        for span, target in layout.chunks(weight, targets, weights=found):
            loss, _ = _chunk_loss(dense_gemm.linear(hidden[span], weight), target, with_gradient=False)
            found[span] = -loss
        ctx.save_for_backward(hidden, weight, targets)
        ctx.layout = layout
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        found = _Gradients(hidden, weight, ctx.layout.chunk_tokens, frozen=not ctx.needs_input_grad[1])
        for span, target in ctx.layout.chunks(weight, targets, weights=-gradients[0].float()):
            _, gradient = _chunk_loss(dense_gemm.linear(hidden[span], weight), target, with_gradient=True)
            assert gradient is not None
            found.add(span, gradient)
        return found.hidden, None if found.weight is None else found.weight.to(weight.dtype), None, None


class _Gradients:
    """Gradients of the hidden states and of the output weight, which grow chunk by chunk.

    Args:
        hidden: [n, h].
        weight: [v / TP, h].
        chunk: rows of a chunk.
        frozen: the output weight needs no gradient.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, chunk: int, *, frozen: bool) -> None:
        self._inputs, self._weight, self._frozen = hidden, weight, frozen
        self.hidden = torch.empty_like(hidden)
        # The gradients of several bf16 chunks are summed in fp32. One chunk needs no sum: its GEMM rounds once.
        whole = weight.dtype != torch.float32 and hidden.shape[0] <= chunk
        self.weight = None if whole or frozen else torch.zeros_like(weight, dtype=torch.float32)

    def add(self, span: slice, gradient: torch.Tensor) -> None:
        """Adds a chunk's gradient of the logits, [chunk, v / TP]."""
        dense_gemm.linear(gradient, self._weight.t(), out=self.hidden[span])
        if self._frozen:
            return
        if self.weight is None:
            self.weight = gradient.t() @ self._inputs[span]
        elif self._weight.dtype == torch.float32:
            dense_gemm.add_weight_gradient_(self.weight, gradient, self._inputs[span])
        else:
            self.weight += gradient.t() @ self._inputs[span]


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
        from megatron_qwen.objectives.cross_entropy_kernels import loss_and_gradient

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
