"""One thing in which two models differ, and how two tensors differ value by value."""

from dataclasses import dataclass

import torch

from checkpoints_convert.tensor_set import TensorSet, blocks


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Args:
        kind: ``tensor``, ``configuration``, ``tokenizer``, ``file`` or ``logits``.
        name: of what.
        detail: how.
        size: how far apart: of a tensor, the largest difference in units of its largest value; inf where that says
            nothing.
    """

    kind: str
    name: str
    detail: str
    size: float = float("inf")


def value_difference(a: TensorSet, b: TensorSet, name: str) -> Difference | None:
    """How the values of a tensor differ; None where bits are equal. Shapes are equal."""
    largest = scale = 0.0
    count = different = 0
    for ours, theirs in blocks([a, b], name):
        count += ours.numel()
        if ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs)):
            scale = max(scale, float(ours.abs().max().float()))
            continue
        one, other = ours.float(), theirs.float()
        unequal = _bits(one) != _bits(other)
        different += int(unequal.sum())
        apart = (one - other).abs().where(unequal, 0.0)
        largest = max(largest, float(apart.nan_to_num(nan=torch.inf).max()))
        scale = max(scale, float(one.abs().max()))
    if not different:
        return None
    size = largest / scale if scale and largest != float("inf") else float("inf")
    detail = f"differs in {different:,} of {count:,} values, by {largest:.3e} at most ({size:.2e} of its largest value)"
    return Difference("tensor", name, detail, size)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Values as integers of their bits, so that -0 is not 0 and NaN is itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])
