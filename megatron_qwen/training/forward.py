"""One micro-batch through a model chunk, to the sum of its losses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.models.core_config import DTYPES
from megatron_qwen.models.loss import output_loss
from megatron_qwen.models.sequences import PackedSequences, packed_sequences
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.vocabulary import padded_vocab_size

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
ForwardStep = Callable[[Iterator[Batch | None], Any], tuple[torch.Tensor, LossFunction]]


def loss_chunk_tokens(config: RunConfig) -> int:
    """Tokens per chunk of the cross-entropy: a rank holds the logits of this many tokens at a time."""
    tp = config.parallel.tensor_model_parallel_size
    row_bytes = padded_vocab_size(config.model.vocab_size, tp) // tp * DTYPES[config.precision.dtype].itemsize
    return config.performance.cross_entropy_chunk_tokens or device.loss_chunk_tokens(row_bytes)


def make_forward_step(config: RunConfig, groups: ProcessGroupCollection) -> ForwardStep:
    """The function megatron-core's schedules call for every micro-batch and model chunk.

    A model chunk in the middle of the pipeline needs neither tokens nor labels, so its batch is None, unless sequences
    are packed: then its attention needs cu_seqlens.
    """

    chunk_tokens = loss_chunk_tokens(config)

    def output_layer_loss(
        *, hidden_states: Any, output_layer: Any, output_weight: Any, context: Batch, **_: Any
    ) -> Any:
        return output_loss(
            hidden_states,
            # With tied embeddings on the same rank the output layer has no weight of its own: it is passed in, and
            # it has arrived (``arrival.py``) because the embedding was called before.
            output_weight if output_layer.weight is None else arrived_weight(output_layer),
            context.labels,
            context.loss_mask,
            groups=groups,
            sequence_parallel=config.parallel.sequence_parallel,
            vocab_size=config.model.vocab_size,
            chunk_tokens=chunk_tokens,
        )

    def forward_step(batches: Iterator[Batch | None], chunk: Any) -> tuple[torch.Tensor, LossFunction]:
        batch = next(batches)
        if batch is None:
            return chunk(None, None, None), partial(_sum_loss, torch.ones(1, 1))
        output = chunk(
            batch.tokens,
            batch.position_ids,
            None,
            packed_seq_params=_sequences(batch),
            labels=batch.labels,
            output_processor=output_layer_loss,
            output_processor_context=batch,
        )
        return output, partial(_sum_loss, batch.loss_mask)

    return forward_step


def _sequences(batch: Batch) -> PackedSequences | None:
    if batch.cu_seqlens is None:
        return None
    return packed_sequences(batch.cu_seqlens, batch.seq_lengths, batch.position_ids[0])


def _sum_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of token losses (a scalar), number of tokens with loss (int), and both as a [2] float32 tensor for the log.

    megatron-core divides the gradients by the number of tokens over all ranks (calculate_per_token_loss), so the sum is
    returned and not a mean.
    """
    tokens = mask.sum()
    report = torch.stack((output.detach().float(), tokens.float()))
    return output, tokens.to(torch.int), {"loss and tokens": report}
