"""One micro-batch through a model chunk, to the objective's loss."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.models.build import unwrapped
from megatron_qwen.models.core_config import DTYPES
from megatron_qwen.models.lora.attach import head_adapter
from megatron_qwen.models.lora.vocabulary import HeadAdapter
from megatron_qwen.models.sequences import PackedSequences, packed_sequences
from megatron_qwen.models.torch_backend.arrival import arrived_weight
from megatron_qwen.models.vocabulary import padded_vocab_size
from megatron_qwen.objectives.base import Objective, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead

LossFunction = Callable[[Any], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
# Key of a micro-batch's sums in what a loss function reports.
SUMS = "sums"


def loss_chunk_tokens(config: RunConfig) -> int:
    """Tokens per chunk of the cross-entropy: a rank holds the logits of this many tokens at a time."""
    tp = config.parallel.tensor_model_parallel_size
    row_bytes = padded_vocab_size(config.model.vocab_size, tp) // tp * DTYPES[config.precision.dtype].itemsize
    return config.performance.cross_entropy_chunk_tokens or device.loss_chunk_tokens(row_bytes)


class ForwardStep:
    """What megatron-core's schedules call for every micro-batch and model chunk.

    Args:
        config: of the run.
        groups: of this rank.
        objective: of the run.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection, objective: Objective) -> None:
        self._groups, self._objective = groups, objective
        self._sequence_parallel = config.parallel.sequence_parallel
        self._vocab_size = config.model.vocab_size
        self._has_routers = config.model.is_moe
        self._chunk_tokens = loss_chunk_tokens(config)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the objective's metrics, in the order of their sums in a report."""
        return self._objective.metrics

    def __call__(self, batches: Iterator[Batch | None], chunk: Any) -> tuple[Any, LossFunction]:
        """Runs a chunk.

        A model chunk in the middle of the pipeline needs neither tokens nor labels, so its batch is None, unless
        sequences are packed: then its attention needs cu_seqlens.

        Returns:
            Hidden states, or at the end of the pipeline an ``ObjectiveResult``; and the function that turns the latter
            into what the schedule wants.
        """
        batch = next(batches)
        if batch is None:
            return chunk(None, None, None), partial(_sums, self.metrics, batch)
        output = chunk(
            batch.tokens,
            batch.position_ids,
            None,
            packed_seq_params=_sequences(batch),
            padding_mask=batch.padding if self._has_routers else None,
            labels=batch.labels,
            output_processor=partial(self._objective_result, adapter=head_adapter(unwrapped(chunk))),
            output_processor_context=batch,
        )
        return output, partial(_sums, self.metrics, batch)

    def _objective_result(
        self,
        *,
        adapter: HeadAdapter | None,
        hidden_states: torch.Tensor,
        output_layer: Any,
        output_weight: Any,
        context: Batch,
        **_: Any,
    ) -> ObjectiveResult:
        """What GPTModel returns in place of logits or losses."""
        # With tied embeddings on the same rank the output layer has no weight of its own: it is passed in, and it has
        # arrived (``arrival.py``) because the embedding was called before.
        weight = output_weight if output_layer.weight is None else arrived_weight(output_layer)
        if adapter is not None:
            hidden_states, weight = adapter.widened(hidden_states, weight)
        head = OutputHead(
            weight,
            group=self._groups.tp,
            sequence_parallel=self._sequence_parallel,
            vocab_size=self._vocab_size,
            chunk_tokens=self._chunk_tokens,
            context=self._groups.cp,
        )
        return self._objective(hidden_states, head, context)


def _sequences(batch: Batch) -> PackedSequences | None:
    if batch.cu_seqlens is None:
        return None
    return packed_sequences(batch.cu_seqlens, batch.seq_lengths, batch.position_ids[0])


def _sums(
    metrics: tuple[str, ...], batch: Batch | None, result: ObjectiveResult
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss as a sum (a scalar), its weight (int), and, as a float64 tensor, the number of tokens and
    [total, weight] of loss and metrics.

    megatron-core divides the gradients by the weight over all ranks, which it calls the number of tokens
    (calculate_per_token_loss), so the sum is returned and not a mean.
    """
    means = [result.loss, *(result.metrics[name] for name in metrics)]
    assert batch is not None  # only the last stage has a result
    tokens = batch.tokens.new_full((), batch.tokens.numel()) if batch.padding is None else (~batch.padding).sum()
    parts = [tokens, *(part for mean in means for part in (mean.total, mean.weight))]
    report = torch.stack([part.detach().double() for part in parts])
    return result.loss.total, result.loss.weight.to(torch.int), {SUMS: report}
