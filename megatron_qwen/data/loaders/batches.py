"""The micro-batches of one rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_qwen.data.reading.samples import Sample, Source
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
    """A micro-batch, every tensor [b, s / CP].

    Where samples hold independent sequences, the rows are laid end to end: every tensor is [1, b x s / CP], and
    ``bounds`` says where sequences begin in the whole row, and its length at the end; ``lengths`` their lengths.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    bounds: torch.Tensor | None = None
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """On another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a copy to the device overlaps with what it computes."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        bounds = None if self.bounds is None else moved(self.bounds)
        return Batch(
            moved(self.tokens),
            moved(self.labels),
            moved(self.loss_mask),
            moved(self.position_ids),
            bounds,
            self.lengths,
        )


@dataclass(frozen=True)
class Request:
    """The micro-batches of one rank in one global batch.

    The global batch is samples first_sample .. first_sample + global_batch_size - 1; micro-batch m of DP rank d
    takes the ``m x DP + d``-th run of micro_batch_size samples, so the batch is the same set under any DP size.

    Args:
        first_sample: number of the first sample.
        global_batch_size: samples over all ranks.
        micro_batch_size: samples of a micro-batch.
    """

    first_sample: int
    global_batch_size: int
    micro_batch_size: int

    def indices(self, shard: Shard) -> Iterator[range]:
        """The samples of each micro-batch of a rank."""
        stride = self.micro_batch_size * shard.dp_size
        assert self.global_batch_size % stride == 0, "samples would be read twice"
        for begin in range(0, self.global_batch_size, stride):
            start = self.first_sample + begin + shard.dp_rank * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)


def micro_batches(source: Source, shard: Shard, request: Request) -> Iterator[Batch]:
    """The micro-batches of one global batch that belong to a rank, on the host."""
    for indices in request.indices(shard):
        yield collate([source[index] for index in indices], shard, separate=source.separates)


def collate(samples: Sequence[Sample], shard: Shard, *, separate: bool) -> Batch:
    """Stacks samples and cuts the sequence for the context-parallel rank."""
    size = len(samples[0].tokens)
    positions = [_positions(sample.starts, size) for sample in samples]

    def place(rows: Sequence[npt.NDArray[np.generic]]) -> torch.Tensor:
        whole = torch.from_numpy(np.stack(rows))
        if separate:
            whole = whole.view(1, -1)
        return slice_for_rank(whole, rank=shard.cp_rank, size=shard.cp_size).contiguous()

    bounds, lengths = None, ()
    if separate:
        starts = [sample.starts + index * size for index, sample in enumerate(samples)]
        ends = np.concatenate([*starts, [len(samples) * size]]).astype(np.int32)
        bounds, lengths = torch.from_numpy(ends), tuple(np.diff(ends).tolist())
    return Batch(
        tokens=place([sample.tokens for sample in samples]),
        labels=place([sample.labels for sample in samples]),
        loss_mask=place([sample.loss_mask for sample in samples]),
        position_ids=place(positions),
        bounds=bounds,
        lengths=lengths,
    )


def _positions(starts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Position of each token in its own sequence."""
    positions = np.arange(size, dtype=np.int64)
    if len(starts) == 1:
        return positions
    return positions - np.repeat(starts, np.diff(np.append(starts, size)))
