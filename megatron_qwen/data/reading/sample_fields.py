"""What an objective needs of a sample beside its tokens: which fields, and how they are made."""

from collections.abc import Mapping
from typing import Protocol

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.averages import AverageFields
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.pair_fields import PairFields, Reference
from megatron_qwen.data.reading.samples import Sample


class SampleFields(Protocol):
    """Adds fields to samples."""

    @property
    def fields(self) -> tuple[ExtraField, ...]:
        """Which."""

    def of(self, sample: Sample, source: str) -> Sample:
        """A sample of a source with its fields."""


def sample_fields(config: RunConfig, references: Mapping[str, Reference] | None = None) -> SampleFields:
    """The fields of a run's samples.

    Args:
        config: the run.
        references: what a reference model thinks of the answers of each source, where that is known.
    """
    if config.objective.of_pairs:
        return PairFields(referred=config.objective.kind == "dpo", references=references)
    return AverageFields(config.objective.average if config.objective.kind == "sft" else "token")
