"""An objective that uses every seam: extra fields per token and per sequence, log-probabilities, metrics, a weight.

Its loss is the mean over sequences of scale x sum of advantage x log-probability, as in policy gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import Batch, BatchRequest, micro_batches
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead

FIELDS = (ExtraField("advantage", "float32", per="token"), ExtraField("scale", "float32", per="sequence"))


class Advantages:
    """The objective; for batches that are not packed."""

    extra_fields = FIELDS
    metrics = ("log_prob", "scale")

    def __call__(self, hidden: Any, head: OutputHead, batch: Batch) -> ObjectiveResult:
        log_probs = head.log_probs(hidden, batch.labels)
        advantage, scale = batch.extra["advantage"], batch.extra["scale"]
        loss = -(scale[:, None] * advantage * batch.loss_mask * log_probs).sum()
        # Context-parallel ranks share a sequence; the first one's tokens say whose it is.
        sequences = (batch.position_ids[:, 0] == 0).sum()
        metrics = {
            "log_prob": Mean((log_probs * batch.loss_mask).sum(), batch.loss_mask.sum()),
            "scale": Mean(scale.sum(), scale.new_tensor(len(scale))),
        }
        return ObjectiveResult(Mean(loss, sequences), metrics)


def extra_of(sample: int, length: int) -> dict[str, np.ndarray]:
    """The extra fields of a sample."""
    drawn = np.random.default_rng(sample)
    return {
        "advantage": drawn.normal(size=length).astype(np.float32),
        "scale": drawn.uniform(0.5, 2.0, size=1).astype(np.float32),
    }


@dataclass(frozen=True)
class WithAdvantages:
    """A source's samples with the extra fields."""

    source: Any
    extra_fields = FIELDS

    @property
    def seq_length(self) -> int:
        return self.source.seq_length

    @property
    def is_packed(self) -> bool:
        return self.source.is_packed

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], extra=extra_of(index, self.seq_length))


def first_step(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """The first step of a run with this objective."""
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.forward import ForwardStep
    from megatron_qwen.training.resume import resume
    from megatron_qwen.training.step import train_step

    components = build_components(config)
    resume(components, RunDirectory(run_dir))
    training = config.training
    request = BatchRequest(0, training.global_batch_size, training.micro_batch_size)
    batches: Iterator[Batch] = micro_batches(WithAdvantages(components.data.at(0)), components.batch_slice, request)
    forward = ForwardStep(components.config, components.groups, Advantages())
    result = train_step(
        components.config, components.model, components.optimizer, components.groups, forward, list(batches)
    )
    return {
        "loss": result.loss,
        "weight": result.weight,
        "grad_norm": result.grad_norm,
        "metrics": dict(result.metrics),
    }
