"""Weights of tokens for a loss that is a mean over sequences or samples, not over tokens.

In a mean over tokens a long answer counts more than a short one. Where every sequence is to count the same, each of its
tokens with loss weighs one part of it, and the sum is divided by the number of sequences with loss in the global batch:
so the result depends neither on packing nor on the layout.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample

Average = Literal["token", "sequence", "sample"]
WEIGHT = ExtraField("average_weight", "float32", "token")
# 1 at one token of every unit that is averaged: context-parallel ranks each have some, and count each unit once.
COUNT = ExtraField("average_count", "int64", "token")


def fields_of(average: Average) -> tuple[ExtraField, ...]:
    """The fields that an average needs; a mean over tokens needs the loss mask alone."""
    return () if average == "token" else (WEIGHT, COUNT)


class AverageFields:
    """``SampleFields`` of a mean.

    Args:
        average: what counts the same in the loss.
    """

    def __init__(self, average: Average = "token") -> None:
        self._average, self.fields = average, fields_of(average)

    def of(self, sample: Sample, source: str) -> Sample:
        """A sample with its fields."""
        return with_average(sample, self._average)


def with_average(sample: Sample, average: Average) -> Sample:
    """A sample with the fields of an average."""
    if average == "token":
        return sample
    mask = sample.loss_mask
    starts = sample.starts if average == "sequence" else np.zeros(1, dtype=np.int64)
    sums = np.add.reduceat(mask, starts)
    lengths = np.diff(np.append(starts, len(mask)))
    weight = mask / np.repeat(np.where(sums > 0, sums, 1), lengths)
    count = np.zeros(len(mask), dtype=np.int64)
    count[starts[sums > 0]] = 1
    own = {WEIGHT.name: weight.astype(np.float32), COUNT.name: count}
    return replace(sample, extra={**sample.extra, **own})
