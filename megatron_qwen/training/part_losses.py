"""Losses of the parts of a validation: of each source in bits per byte, of conversations by who wrote the tokens.

Bits per byte do not change with the tokenizer. Of conversations the loss is in nats per token: ``assistant`` is what
training minimises, ``prompt`` everything else (system texts, users' turns, results of tools, the template's words).
"""

import math
from collections.abc import Collection, Mapping
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

_PART = ExtraField("part", "int64", "token")
_COUNT = ExtraField("count", "int64", "token")


class TextParts:
    """The sources of texts, measured by bytes.

    Args:
        counts: bytes by id.
    """

    prefix = "validation_bits_per_byte"
    unit = math.log(2)

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def names(self, sources: list[str]) -> list[str]:
        """A part for every source."""
        return sources

    def of(self, sample: Sample, source: int) -> tuple[Counts, Counts]:
        """Of every label its part, and what it counts: the bytes that it stands for, 0 where it carries no loss."""
        known = sample.labels < len(self._counts)
        count = np.where(known, self._counts[np.where(known, sample.labels, 0)], 0)
        count[sample.loss_mask == 0] = 0
        return np.full_like(count, source), count


class ConversationParts:
    """Two parts of every source of conversations, measured by tokens: what the assistant wrote, and the rest.

    Args:
        texts: sources without loss masks, which have one part.
    """

    prefix = "validation_loss"
    unit = 1.0

    def __init__(self, texts: Collection[str] = ()) -> None:
        self._texts = frozenset(texts)

    def names(self, sources: list[str]) -> list[str]:
        """``SOURCE/assistant`` and ``SOURCE/prompt``; of a text ``SOURCE/text``, and one that stays empty."""
        return [
            f"{source}/{role}"
            for source in sources
            for role in (("text", "none") if source in self._texts else ("assistant", "prompt"))
        ]

    def of(self, sample: Sample, source: int) -> tuple[Counts, Counts]:
        """Of every label its part, and 1; 0 where it is the next conversation's, or padding."""
        carries = sample.loss_mask > 0
        count = np.ones(len(carries), dtype=np.int64)
        count[len(carries) - sample.padding :] = 0
        count[[*(sample.starts[1:] - 1).tolist(), -1]] = 0
        count[carries] = 1  # a text is cut, not ended, by a row's end
        return np.where(carries, 2 * source, 2 * source + 1), count


class PartedSamples:
    """Held-out samples that say of every label which part it is of, and what it counts there.

    Args:
        samples: of all sources.
        parts: how they are divided.
    """

    def __init__(self, samples: HeldOutSamples, parts: TextParts | ConversationParts) -> None:
        self._samples, self._parts = samples, parts
        self.seq_length, self.is_packed = samples.seq_length, samples.is_packed
        self.extra_fields = (*samples.extra_fields, _PART, _COUNT)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``."""
        sample = self._samples[index]
        part, count = self._parts.of(sample, self._samples.source_of(index))
        return replace(sample, extra={**sample.extra, _PART.name: part, _COUNT.name: count})


class PartLosses:
    """An objective, and beside it sums of cross-entropy and counts by part.

    Args:
        objective: whose loss it gives.
        groups: of this rank.
        parts: how the samples are divided.
    """

    def __init__(
        self, objective: Objective, groups: ProcessGroupCollection, parts: TextParts | ConversationParts
    ) -> None:
        self._objective, self._groups, self._parts = objective, groups, parts
        self.extra_fields, self.metrics = objective.extra_fields, objective.metrics
        self._sums = torch.zeros(0, 2, dtype=torch.float64)

    def begin(self, sources: list[str], device: torch.device) -> None:
        """Forgets the sums."""
        self._sums = torch.zeros(len(self._parts.names(sources)), 2, dtype=torch.float64, device=device)

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        with torch.no_grad():
            count = batch.extra[_COUNT.name].double()
            # Bytes count a label several times, or, of a control token, not at all; its loss is always there.
            carries = (batch.loss_mask > 0) | (count > 0)
            losses = -head.log_probs(hidden, batch.labels).double() * carries
            both = torch.stack((losses, count), dim=-1)
            self._sums.index_add_(0, batch.extra[_PART.name].flatten(), both.flatten(0, 1))
        return self._objective(hidden, head, batch)

    def means(self, sources: list[str]) -> Mapping[str, float]:
        """The loss of every part that had any text, on all ranks, by the name that a record has; all of them call it.

        Args:
            sources: by their number.
        """
        if self._groups.tp.rank() > 0:
            self._sums.zero_()  # tensor-parallel ranks all have the same
        dist.all_reduce(self._sums)
        return {
            f"{self._parts.prefix}/{name}": loss / self._parts.unit / count
            for name, (loss, count) in zip(self._parts.names(sources), self._sums.tolist(), strict=True)
            if count and not name.endswith("/none")
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
