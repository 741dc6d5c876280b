"""What a format of quantized weights has to say for its directories to be read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from checkpoints_convert.dequantize.module_names import ModuleNames
from checkpoints_convert.dequantize.quantized_rows import QuantizedRows
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.safetensors_format import StoredEntry

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a directory are quantized.

    Args:
        method: ``quant_method`` of config.json.
        precision: of a code: ``int4``, ``int8`` or ``fp8``.
        parameters: what else config.json says, for people.
        may_fold: whether the method scales norms and neighbouring weights before it rounds (AWQ, SmoothQuant), so that
            a weight differs from the original by a diagonal matrix; the format itself does not tell.
        inputs: how a program rounds a layer's inputs when it runs the model, for people; None: not at all.
    """

    method: str
    precision: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    may_fold: bool = False
    inputs: str | None = None

    def __str__(self) -> str:
        words = [f"{name} {str(value).lower() if isinstance(value, bool) else value}"
                 for name, value in self.parameters.items()]  # fmt: skip
        return f"{self.method}, {self.precision}" + "".join(f", {word}" for word in words)


@dataclass(frozen=True)
class Part:
    """A tensor that a quantized weight is stored in.

    Args:
        shapes: which it may have.
        dtypes: which it may have.
        optional: whether it may be absent.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class QuantizedWeight(Protocol):
    """A quantized weight whose parts are there, with the right shapes."""

    def rows(self, start: int, stop: int) -> QuantizedRows:
        """Rows [stop - start, in]; reads no more than these need."""

    def faults(self) -> Iterable[tuple[str, str]]:
        """Reads scales, zeros, indices and shapes, not the codes: (name of the tensor, what is wrong with it)."""


class DirectoryFormat(Protocol):
    """A format, with the parameters that a config.json gives it."""

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""

    @property
    def left_out(self) -> ModuleNames:
        """Modules that stay as they are."""

    def is_quantized(self, parts: Mapping[str, StoredEntry]) -> bool:
        """Whether a module's tensors, by the last component of their names, are those of a quantized weight."""

    def shape_fault(self, shape: tuple[int, int]) -> str | None:
        """Why the format cannot hold a weight of [out, in]; None if it can."""

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        """The tensors of a weight of [out, in], by the last component of their names."""

    def open(self, stored: StoredTensors, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """A weight whose parts were found right."""
