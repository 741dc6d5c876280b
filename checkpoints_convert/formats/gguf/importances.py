"""The importance matrix of GGUF files: how much each input of a weight matters (llama.cpp, tools/imatrix)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
import xxhash

from checkpoints_convert.formats.gguf.names import GgufTensor
from megatron_qwen.errors import Problem


class Importances(Protocol):
    """An importance matrix, which need not be there before its values are asked for; asked for from several threads."""

    @property
    def digest(self) -> str:
        """A hash that differs where values differ; known before they are."""

    def problems(self, tensors: Mapping[str, GgufTensor]) -> list[Problem]:
        """What is wrong with it for a file of these tensors, by name."""

    def prepare(self) -> None:
        """Finds the values; called before any is asked for."""

    def has(self, name: str) -> bool:
        """Whether there are values for a tensor of a file."""

    def columns(self, name: str, part: int) -> torch.Tensor:
        """Of the columns of a tensor of a file, float32 [columns]; of the expert ``part`` where it holds several."""


@dataclass(frozen=True)
class GivenImportances:
    """Values that are there.

    Args:
        values: float32 by the name of the tensor in a file (``names.gguf_name``): [columns], or [experts, columns].
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of all names and values."""
        found = xxhash.xxh3_128()
        for name, values in sorted(self.values.items()):
            found.update(name.encode())
            found.update(memoryview(values.view(-1).view(torch.uint8).numpy()))
        return found.hexdigest()

    def problems(self, tensors: Mapping[str, GgufTensor]) -> list[Problem]:
        """Names, shapes and values that do not fit."""
        problems = []
        for name, values in self.values.items():
            tensor = tensors.get(name)
            shape = None if tensor is None else _shape(tensor)
            if tuple(values.shape) != shape or values.dtype != torch.float32 or not values.is_contiguous():
                fix = "must be float32 [columns], or [experts, columns], of a tensor of the file."
                problems.append(Problem(f"importances: {name}", str([*values.shape]), fix))
            elif not bool(values.isfinite().all()) or bool((values < 0).any()):
                problems.append(Problem(f"importances: {name}", None, "must be finite and not negative."))
        return problems

    def prepare(self) -> None:
        """Nothing: they are there."""

    def has(self, name: str) -> bool:
        """Whether there are values for a tensor of a file."""
        return name in self.values

    def columns(self, name: str, part: int) -> torch.Tensor:
        """Of the columns of a tensor of a file, float32 [columns]."""
        values = self.values[name]
        return values if values.dim() == 1 else values[part]


def _shape(tensor: GgufTensor) -> tuple[int, ...]:
    experts = len(tensor.sources)
    return (experts, tensor.columns) if experts > 1 else (tensor.columns,)
