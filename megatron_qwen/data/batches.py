"""The micro-batches of one rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_qwen.data.samples import WindowSource
from megatron_qwen.distributed.sequence import slice_for_rank


@dataclass(frozen=True)
class Shard:
    """Which part of a batch a rank takes.

    Args:
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        cp_rank: context-parallel rank.
        cp_size: context-parallel size.
        device: where the tensors go.
    """

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    device: torch.device


@dataclass(frozen=True)
class Batch:
    """A micro-batch, every tensor [b, s / CP]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor


def micro_batches(
    source: WindowSource, shard: Shard, *, first_sample: int, global_batch_size: int, micro_batch_size: int
) -> Iterator[Batch]:
    """The micro-batches of one global batch that belong to a rank.

    The global batch is samples first_sample .. first_sample + global_batch_size - 1; micro-batch m of DP rank d
    takes the ``m x DP + d``-th run of micro_batch_size samples, so the batch is the same set under any DP size.
    """
    stride = micro_batch_size * shard.dp_size
    for begin in range(0, global_batch_size, stride):
        start = first_sample + begin + shard.dp_rank * micro_batch_size
        yield load_batch(source, range(start, start + micro_batch_size), shard)


def load_batch(source: WindowSource, indices: range, shard: Shard) -> Batch:
    """Stacks samples and cuts the sequence for the context-parallel rank."""
    samples = [source[index] for index in indices]
    positions = np.broadcast_to(np.arange(source.seq_length), (len(samples), source.seq_length))

    def place(rows: list[np.ndarray]) -> torch.Tensor:
        tensor = slice_for_rank(torch.from_numpy(np.stack(rows)), rank=shard.cp_rank, size=shard.cp_size)
        return tensor.contiguous().to(shard.device, non_blocking=True)

    return Batch(
        tokens=place([sample.tokens for sample in samples]),
        labels=place([sample.labels for sample in samples]),
        loss_mask=place([sample.loss_mask for sample in samples]),
        position_ids=place(list(positions)),
    )
