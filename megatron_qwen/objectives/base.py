"""What an objective is: the part of a run that turns the model's last hidden states into a loss.

Everything else of a run (schedule, layout, optimizer, checkpoints, callbacks) is the same for every objective.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.objectives.output_head import OutputHead


@dataclass(frozen=True)
class Mean:
    """A mean over the global batch in two parts, because a mean of the ranks' means would depend on the layout.

    Args:
        total: sum over this micro-batch, a scalar.
        weight: what the sum over the global batch is divided by, this micro-batch's part; a scalar.
    """

    total: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective makes of a micro-batch, on a rank of the last pipeline stage.

    Args:
        loss: its sum carries the gradient. Its weight is a whole number: tokens, or sequences.
        metrics: further figures for metrics.jsonl, without gradients; the keys are ``Objective.metrics``.
    """

    loss: Mean
    metrics: Mapping[str, Mean] = field(default_factory=dict)


def whole_numbers(weights: torch.Tensor, unit: int) -> torch.Tensor:
    """Weights of tokens as multiples of 1 / ``unit``, so that their sum is a whole number whatever they are."""
    return weights if unit == 1 else (weights * unit).round()


class Objective(Protocol):
    """The loss of a run. It is called on the ranks of the last pipeline stage; all TP ranks get the same result."""

    @property
    def extra_fields(self) -> tuple[ExtraField, ...]:
        """Fields of a batch that it needs in addition to tokens, labels, loss mask and positions."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its metrics. Every rank must know them: ranks without a loss take part in the reduction."""

    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """The loss of a micro-batch.

        Args:
            hidden: output of the last layer, [s / CP, b, h], or [s / CP / TP, b, h] under sequence parallelism.
            head: the output layer.
            batch: the micro-batch; this rank's part of it under context parallelism.
        """
