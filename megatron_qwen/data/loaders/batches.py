"""The micro-batches of one rank: which samples they hold, and how samples become tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample, SampleSource
from megatron_qwen.distributed.sequence import slice_for_rank


@dataclass(frozen=True)
class BatchSlice:
    """Which part of a global batch a rank reads.

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
    """A micro-batch of b samples of s tokens; every tensor is [b, s / CP].

    Packed (THD): where a sample may hold several independent sequences, the samples are concatenated into one row and
    every tensor is [1, b * s / CP]. ``cu_seqlens`` [sequences + 1] holds the cumulative sequence lengths in the whole
    row, before it is cut over context-parallel ranks: 0 first, b * s last. ``seq_lengths`` holds the lengths
    themselves on the host, because reading them back from the device would wait for it.

    ``padding`` is true where a position holds no token; None unless packed.

    ``extra`` holds the source's extra fields: those per token as the other tensors, those per sequence [sequences], in
    the order of the samples and of the sequences in each.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    seq_lengths: tuple[int, ...] = ()
    padding: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which copies to the device overlap with its kernels."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            loss_mask=moved(self.loss_mask),
            position_ids=moved(self.position_ids),
            cu_seqlens=None if self.cu_seqlens is None else moved(self.cu_seqlens),
            padding=None if self.padding is None else moved(self.padding),
            extra={name: moved(tensor) for name, tensor in self.extra.items()},
        )


@dataclass(frozen=True)
class BatchRequest:
    """The micro-batches of one rank in one global batch.

    The global batch is samples first_sample .. first_sample + global_batch_size - 1; micro-batch m of DP rank d
    takes the ``m x DP + d``-th group of micro_batch_size consecutive samples, so the batch is the same set under any
    data-parallel size.

    Args:
        first_sample: number of the first sample.
        global_batch_size: samples over all ranks.
        micro_batch_size: samples of a micro-batch.
    """

    first_sample: int
    global_batch_size: int
    micro_batch_size: int

    def indices(self, batch_slice: BatchSlice) -> Iterator[range]:
        """Sample numbers of each micro-batch of a rank."""
        stride = self.micro_batch_size * batch_slice.dp_size
        assert self.global_batch_size % stride == 0, "samples would be read twice"
        for begin in range(0, self.global_batch_size, stride):
            start = self.first_sample + begin + batch_slice.dp_rank * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)


def micro_batches(source: SampleSource, batch_slice: BatchSlice, request: BatchRequest) -> Iterator[Batch]:
    """A rank's micro-batches of one global batch, on the host."""
    for indices in request.indices(batch_slice):
        samples = [source[index] for index in indices]
        yield collate(samples, batch_slice, packed=source.is_packed, extra_fields=source.extra_fields)


def collate(
    samples: Sequence[Sample], batch_slice: BatchSlice, *, packed: bool, extra_fields: Sequence[ExtraField] = ()
) -> Batch:
    """Builds a micro-batch: [b, s / CP] tensors, or [1, b * s / CP] and cu_seqlens if ``packed``.

    The sequence is cut for the context-parallel rank in load-balanced order (``distributed/sequence.py``). Positions
    are computed before the cut: each token has its position in its own sequence.
    """
    size = len(samples[0].tokens)
    positions = [_positions(sample.starts, size) for sample in samples]

    def place(rows: Sequence[npt.NDArray[np.generic]]) -> torch.Tensor:
        whole = torch.from_numpy(np.stack(rows))
        if packed:
            whole = whole.view(1, -1)
        return slice_for_rank(whole, rank=batch_slice.cp_rank, size=batch_slice.cp_size).contiguous()

    cu_seqlens, seq_lengths = None, ()
    if packed:
        starts = [sample.starts + index * size for index, sample in enumerate(samples)]
        ends = np.concatenate([*starts, [len(samples) * size]]).astype(np.int32)
        cu_seqlens, seq_lengths = torch.from_numpy(ends), tuple(np.diff(ends).tolist())
    return Batch(
        tokens=place([sample.tokens for sample in samples]),
        labels=place([sample.labels for sample in samples]),
        loss_mask=place([sample.loss_mask for sample in samples]),
        position_ids=place(positions),
        cu_seqlens=cu_seqlens,
        seq_lengths=seq_lengths,
        padding=place([np.arange(size) >= size - sample.padding for sample in samples]) if packed else None,
        extra={
            extra.name: place(rows) if extra.per == "token" else torch.from_numpy(np.concatenate(rows))
            for extra in extra_fields
            for rows in [_extra_rows(samples, extra)]
        },
    )


def _extra_rows(samples: Sequence[Sample], extra: ExtraField) -> list[npt.NDArray[np.generic]]:
    """A field of every sample, [s] or [sequences] each."""
    rows = [sample.extra[extra.name] for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        extra.require(row, tokens=len(sample.tokens), sequences=len(sample.starts))
    return rows


def _positions(starts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """[s] position of each token in its own sequence."""
    positions = np.arange(size, dtype=np.int64)
    if len(starts) == 1:
        return positions
    return positions - np.repeat(starts, np.diff(np.append(starts, size)))
