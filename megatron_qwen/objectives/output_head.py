"""The output layer of a rank, as objectives use it: cross-entropy and log-probabilities, never all logits."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_qwen.models.torch_backend import dense_gemm
from megatron_qwen.objectives.cross_entropy import (
    LogitLayout,
    log_probs,
    log_probs_of_logits,
    weighted_cross_entropy,
    with_weight,
)


@dataclass(frozen=True)
class RowLosses:
    """Cross-entropy of a micro-batch, in nats.

    Args:
        total: sum of weight x loss, a scalar in fp32 with a gradient.
        losses: of each row that was computed, without a gradient, [n].
        targets: of each row, [n].
        weights: of each row, [n].
    """

    total: torch.Tensor
    losses: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class OutputHead:
    """The output layer of this rank.

    Args:
        weight: this rank's rows of the output matrix, [padded vocabulary / TP, h].
        group: the TP ranks, which share the vocabulary.
        sequence_parallel: whether hidden states are split over the TP ranks.
        vocab_size: rows of the whole matrix without padding.
        chunk_tokens: tokens whose logits are held at a time.
        context: the CP ranks, which share the sequences; None where each has whole ones.
    """

    weight: torch.Tensor
    group: dist.ProcessGroup
    sequence_parallel: bool
    vocab_size: int
    chunk_tokens: int
    context: dist.ProcessGroup | None = None

    @property
    def counts(self) -> bool:
        """Whether this rank is the one of its CP ranks that counts what all of them know, such as whole sequences."""
        return self.context is None or self.context.rank() == 0

    def sequence_sums(self, values: torch.Tensor, numbers: torch.Tensor, sequences: int) -> torch.Tensor:
        """Sum of the values of each sequence over all its tokens, [sequences]; the same on every CP rank.

        The gradient is that of this rank's tokens.

        Args:
            values: of some tokens of this rank, [n].
            numbers: of the sequence of each, [n].
            sequences: how many there are.
        """
        own = values.new_zeros(sequences).index_add(0, numbers, values)
        if self.context is None or self.context.size() == 1:
            return own
        whole = own.detach().clone()
        dist.all_reduce(whole, group=self.context)
        return own + (whole - own.detach())

    def cross_entropy(
        self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *, skip_weightless: bool = False
    ) -> RowLosses:
        """Sum over tokens of weight x cross-entropy, and the loss of each; the same on every TP rank.

        The gradients are computed in the forward pass, while the logits of a chunk are there. So the weights must be
        known before the loss is.

        Args:
            hidden: output of the last layer, [s, b, h], or [s / TP, b, h] under sequence parallelism.
            labels: next tokens, [b, s].
            weights: of each token's loss, [b, s].
            skip_weightless: leaves out tokens of weight 0, whose share must be known on the host: on a GPU this waits
                for it. It pays where much of a batch carries no loss.
        """
        rows, targets = self._rows(hidden), labels.t().reshape(-1)
        factors = weights.t().reshape(-1).float()
        if skip_weightless:
            rows, targets, factors = with_weight(rows, targets, factors, self._layout.block_rows(self.weight))
        total, losses = weighted_cross_entropy(rows, self.weight, targets, factors, self._layout)
        return RowLosses(total, losses, targets, factors)

    def log_probs(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probability of each label, [b, s] in fp32; the same on every TP rank.

        The backward pass computes the logits again, chunk by chunk, so any function of the log-probabilities can be a
        loss. It costs one more GEMM of the output layer than ``cross_entropy``.

        Args:
            hidden: as in ``cross_entropy``.
            labels: tokens whose log-probabilities are wanted, [b, s].
        """
        found = log_probs(self._rows(hidden), self.weight, labels.t().reshape(-1), self._layout)
        return found.view(labels.shape[1], labels.shape[0]).t()

    def log_probs_where(self, hidden: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the labels that are chosen, [n] in fp32, in the order of ``chosen.flatten()`` of [s, b].

        Args:
            hidden: as in ``cross_entropy``.
            labels: [b, s].
            chosen: bool, [b, s]; at least one is. Its number must be known on the host: on a GPU this waits for it.
        """
        (places,) = chosen.t().reshape(-1).nonzero(as_tuple=True)
        rows = self._rows(hidden).index_select(0, places)
        return log_probs(rows, self.weight, labels.t().reshape(-1)[places], self._layout)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's logits of some tokens, [n, h] -> [n, padded vocabulary / TP]; without autograd."""
        return dense_gemm.linear(rows, self.weight)

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the whole vocabulary without padding, fp32 [n, v], on every TP rank."""
        if self.group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.group)
            logits = torch.cat(parts, dim=1)
        return logits[:, : self.vocab_size].float()

    def log_probs_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of labels [n] by this rank's logits, which are overwritten; the bits of ``log_probs``."""
        return log_probs_of_logits(logits, labels, self._layout)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states of all tokens, [s x b, h], from those of this rank; without autograd."""
        return self._rows(hidden)

    @property
    def _layout(self) -> LogitLayout:
        return LogitLayout(self.group, self.vocab_size, self.chunk_tokens)

    def _rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states of all tokens, [s x b, h]; their gradients are summed over the TP ranks."""
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.group)
        return hidden.reshape(-1, hidden.shape[-1])
