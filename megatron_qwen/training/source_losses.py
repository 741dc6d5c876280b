"""Loss of each source in bits per byte, beside the loss of an objective: numbers that tokenizers do not change."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.held_out_samples import HeldOutSamples
from megatron_qwen.data.reading.samples import Sample
from megatron_qwen.data.tokenizers.token_bytes import Counts, token_bytes
from megatron_qwen.objectives.base import Objective, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead

_SOURCE = ExtraField("source", "int64", "token")
_BYTES = ExtraField("bytes", "int64", "token")


class SourcedSamples:
    """Held-out samples that say which source they are of, and how many bytes every label stands for.

    Args:
        samples: of all sources.
        counts: bytes by id.
    """

    def __init__(self, samples: HeldOutSamples, counts: Counts) -> None:
        self._samples, self._counts = samples, counts
        self.seq_length, self.is_packed = samples.seq_length, samples.is_packed
        self.extra_fields = (*samples.extra_fields, _SOURCE, _BYTES)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``."""
        sample = self._samples[index]
        known = sample.labels < len(self._counts)
        count = np.where(known, self._counts[np.where(known, sample.labels, 0)], 0)
        count[sample.loss_mask == 0] = 0
        own = {_SOURCE.name: np.full_like(count, self._samples.source_of(index)), _BYTES.name: count}
        return replace(sample, extra={**sample.extra, **own})


class SourceLosses:
    """An objective, and beside it sums of cross-entropy and bytes by source.

    Args:
        objective: whose loss it gives.
        groups: of this rank.
    """

    def __init__(self, objective: Objective, groups: ProcessGroupCollection) -> None:
        self._objective, self._groups = objective, groups
        self.extra_fields, self.metrics = objective.extra_fields, objective.metrics
        self._sums = torch.zeros(0, 2, dtype=torch.float64)

    def begin(self, sources: int, device: torch.device) -> None:
        """Forgets the sums."""
        self._sums = torch.zeros(sources, 2, dtype=torch.float64, device=device)

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        with torch.no_grad():
            losses = -(head.log_probs(hidden, batch.labels) * batch.loss_mask).double()
            both = torch.stack((losses, batch.extra[_BYTES.name].double()), dim=-1)
            self._sums.index_add_(0, batch.extra[_SOURCE.name].flatten(), both.flatten(0, 1))
        return self._objective(hidden, head, batch)

    def bits_per_byte(self, names: list[str]) -> Mapping[str, float]:
        """Of every source that had text, on all ranks; all of them call it.

        Args:
            names: of the sources, by their number.
        """
        if self._groups.tp.rank() > 0:
            self._sums.zero_()  # tensor-parallel ranks all have the same
        dist.all_reduce(self._sums)
        return {
            name: loss / math.log(2) / count
            for name, (loss, count) in zip(names, self._sums.tolist(), strict=True)
            if count
        }


def bytes_of_tokens(directory: Path, device: torch.device) -> Counts | None:
    """``token_bytes`` of a tokenizer that rank 0 reads; None on all ranks where it has none."""
    read = token_bytes(directory) if dist.get_rank() == 0 else None
    found = torch.from_numpy(np.zeros(0, dtype=np.int64) if read is None else read).to(device)
    size = torch.tensor([len(found)], device=device)
    dist.broadcast(size, 0)
    if not size:
        return None
    counts = found if dist.get_rank() == 0 else torch.zeros(int(size), dtype=torch.int64, device=device)
    dist.broadcast(counts, 0)
    array: Counts = counts.cpu().numpy()
    return array
