"""What the model at the start of a run thinks of the answers of its pairs, computed once.

The reference of preference training is the model that it begins with. So before the first step one forward pass over
all pairs gives the sums of log-probabilities of both answers of each; they are kept in the run directory with what they
are of. The rows are those of the first epoch, so that the first step finds the very numbers that it computes itself:
its rewards are 0.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_qwen.data.loaders.batches import Batch, BatchRequest, micro_batches
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.held_out_samples import HeldOutSamples
from megatron_qwen.data.reading.pair_fields import CHOSEN, PAIR, REJECTED, SEQUENCE, SIDE, Reference
from megatron_qwen.data.reading.samples import Sample, SampleSource
from megatron_qwen.data.reading.training_data import StageReader, TrainingData
from megatron_qwen.errors import CheckpointError, DataError, Problem
from megatron_qwen.files import atomic_path
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead
from megatron_qwen.objectives.pairs import answer_log_probs
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.step import run_batch

log = logging.getLogger(__name__)
_SOURCE = ExtraField("pair_source", "int64", "sequence")
_NOTE = "of"


def know_reference(components: TrainingComponents, directory: RunDirectory, *, resumed_at: int) -> None:
    """Gives the samples of a run what its reference thinks of them; all ranks call it after the weights are loaded.

    Args:
        components: of the run.
        directory: of the run.
        resumed_at: iteration from which the run goes on.

    Raises:
        CheckpointError: the run has begun, and its note is gone: its weights are no longer those of the reference.
    """
    if components.config.objective.kind != "dpo":
        return
    note = _note(components)
    found = _read(directory, note)
    if found is None and resumed_at:
        fix = (
            "is missing, damaged or of other data: it has what the model thought of the pairs before the first step, "
            "which the weights of now cannot say. Put it back, or start a new run."
        )
        raise CheckpointError(Problem(str(directory.reference), None, fix))
    if found is None:
        found = _computed(components)
        if dist.get_rank() == 0:
            with atomic_path(directory.reference, durable=True) as temporary:
                save_file(dict(found), temporary, metadata={_NOTE: json.dumps(note)})
            log.info("reference: %s pairs, kept in %s", f"{sum(map(len, found.values())):,}", directory.reference)
    components.data.know(found)


def _note(components: TrainingComponents) -> dict[str, Any]:
    """What the figures are of: the pairs, and the model that the run begins with."""
    sources = components.data.sources
    settings = components.config.checkpoint
    return {
        "sources": {name: source.tokens.digest for name, source in sources.items()},
        "model": settings.branch_from or settings.load,
    }


def _read(directory: RunDirectory, note: Mapping[str, Any]) -> dict[str, Reference] | None:
    """The kept figures, as rank 0 finds them; None where there are none of these pairs."""
    told: list[dict[str, Reference] | None] = [None]
    if dist.get_rank() == 0 and directory.reference.is_file():
        try:
            with safe_open(directory.reference, "np") as file:
                if json.loads((file.metadata() or {}).get(_NOTE, "{}")) == note:
                    told[0] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            log.warning("%s cannot be read", directory.reference)
    dist.broadcast_object_list(told)
    return told[0]


class _AnswerSums:
    """An objective without a loss: keeps the log-probability of both answers of every pair.

    Args:
        data: of the run.
        place: device.

    Attributes:
        found: by source, [documents, 2] sums and [documents, 2] how often each was seen.
    """

    extra_fields = (SIDE, SEQUENCE, PAIR, _SOURCE)
    metrics: tuple[str, ...] = ()

    def __init__(self, data: TrainingData, place: torch.device) -> None:
        counts = {name: source.tokens.num_documents for name, source in sorted(data.sources.items())}
        self.names = list(counts)
        self.found = [torch.zeros(2, count, 2, dtype=torch.float64, device=place) for count in counts.values()]

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        sums, _ = answer_log_probs(hidden, head, batch)
        if head.counts and head.group.rank() == 0:
            side, pair, source = (batch.extra[field.name] for field in (SIDE, PAIR, _SOURCE))
            for number, values in enumerate(self.found):
                for column, which in enumerate((CHOSEN, REJECTED)):
                    here = (side == which) & (source == number)
                    values[0, pair[here], column] = sums[here].double()
                    values[1, pair[here], column] = 1.0
        return ObjectiveResult(Mean(sums.new_zeros(()), sums.new_ones((), dtype=torch.int64)))


class _Rows:
    """Rows of pairs that say which source they are of.

    Args:
        samples: of a stage, or held out.
        names: of the sources, by number.
    """

    is_packed = True
    extra_fields = _AnswerSums.extra_fields

    def __init__(self, samples: StageReader | HeldOutSamples, names: Sequence[str]) -> None:
        self._samples, self._names, self.seq_length = samples, names, samples.seq_length

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``."""
        if isinstance(self._samples, HeldOutSamples):
            name, sample = self._samples.names[self._samples.source_of(index)], self._samples[index]
        else:
            name, _, sample = self._samples.traced(index)
        number = np.full(len(sample.starts), self._names.index(name), dtype=np.int64)
        return replace(sample, extra={**sample.extra, _SOURCE.name: number})


def _computed(components: TrainingComponents) -> dict[str, Reference]:
    """One forward pass over all pairs, those held out as well."""
    data, config = components.data, components.config
    objective = _AnswerSums(data, components.batch_slice.device)
    forward = ForwardStep(config, components.groups, objective)
    components.model.train(False)
    with components.model.whole_parameters():
        for samples, rows in _passes(data):
            source = _Rows(samples, objective.names)
            for first in range(0, rows, config.training.global_batch_size):
                _run(components, forward, source, first)
    components.model.train(True)
    for values in objective.found:
        dist.all_reduce(values)
    missing = sum(int((values[1] == 0).any(dim=1).sum()) for values in objective.found)
    if missing:
        fix = "are in no row of an epoch: they are longer than data.seq_length, or held out beyond what is read."
        raise DataError(Problem("pairs", f"{missing:,}", fix))
    # A pair that stands in several rows was added up once for each rank that read it.
    return {
        name: (values[0] / values[1]).float().cpu().numpy()
        for name, values in zip(objective.names, objective.found, strict=True)
    }


def _run(components: TrainingComponents, forward: ForwardStep, source: SampleSource, first: int) -> None:
    config = components.config
    request = BatchRequest(first, config.training.global_batch_size, config.training.micro_batch_size)
    batches = [
        batch.to(components.batch_slice.device) for batch in micro_batches(source, components.batch_slice, request)
    ]
    run_batch(config, components.model, components.groups, forward, batches, forward_only=True)


def _passes(data: TrainingData) -> Iterator[tuple[StageReader | HeldOutSamples, int]]:
    """Rows to read, and how many of them hold every pair once or more."""
    reader = data.at(0)
    wanted = {(name, number) for name, source in data.sources.items() for number in range(source.documents)}
    rows = 0
    while wanted:
        name, _, sample = reader.traced(rows)
        wanted -= {(name, number) for number in sample.documents}
        rows += 1
    yield reader, rows
    if data.config.data.validation_fraction:
        held_out = data.validation(reader)
        yield held_out, held_out.windows
