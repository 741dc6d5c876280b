"""How the rows of a weight become tensors of a file: cast to its format, or quantized values and their scales.

A format of quantized weights is a class with the members of ``Encoding``. What plans a file asks it for the tensors
that it makes of a weight (``output.encoded_tensors``), and what writes the file gives it blocks of rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_qwen.errors import ConversionError, Problem

# Part of an encoding that keeps the name of the weight.
SAME_NAME = ""


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor that an encoding makes of a weight.

    Args:
        shape: its shape.
        dtype: its format.
        value: gives it, where it is not made of blocks of rows: it follows from the shape of the weight
            (compressed-tensors' ``weight_shape``, GPTQ's ``g_idx`` without act-order) or from all of its rows (one
            scale per tensor). Called when the tensor is written, not when the file is planned.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], torch.Tensor] | None = None


class Encoding(Protocol):
    """How a weight is written. The same rows always give the same bytes: a resumed conversion encodes them again."""

    @property
    def block_rows(self) -> int | None:
        """Rows that are encoded together; None for the whole weight.

        1 where a row has its own scales (per channel, in groups along the row, GGUF's blocks), 128 for scales of 128 x
        128 values. None where the input dimension comes first (GPTQ, AWQ): the first word written has a value of every
        row. A weight is then in memory as a whole.
        """

    @property
    def working_dtype(self) -> torch.dtype:
        """Format in which rows are encoded; it decides how many of them are read at once."""

    def tensors(self, shape: tuple[int, ...]) -> Mapping[str, EncodedTensor]:
        """What is made of a weight of some shape, [rows, ...].

        The keys are the last components of the names in the file (``weight_packed``), or ``SAME_NAME``.
        """

    def encode(self, rows: torch.Tensor, *, name: str) -> Mapping[str, torch.Tensor]:
        """Encodes rows.

        Args:
            rows: [n, ...] in the source's format; n is a multiple of ``block_rows``, or the rows up to the last one.
            name: of the tensor in the file, for messages.

        Returns:
            The part of every tensor without a ``value`` that these rows make. Parts of consecutive blocks, one behind
            the other, are the bytes of the tensor.

        Raises:
            ConversionError: the format cannot hold the values.
        """


@dataclass(frozen=True)
class Cast:
    """The weight itself in another floating-point format, or the same.

    Args:
        dtype: the format.
    """

    dtype: torch.dtype

    @property
    def block_rows(self) -> int:
        """One: every value is alone."""
        return 1

    @property
    def working_dtype(self) -> torch.dtype:
        """The format itself."""
        return self.dtype

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """One, of the same name and shape."""
        return {SAME_NAME: EncodedTensor(shape, self.dtype)}

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        """Casts rows.

        Raises:
            ConversionError: a finite value would become infinite (float16 ends at 65,504).
        """
        values = rows.to(self.dtype)
        narrower = self.dtype == torch.float16 and rows.dtype != torch.float16
        if narrower and not torch.equal(values.isfinite(), rows.isfinite()):
            raise ConversionError(Problem(name, "fp16", "holds values beyond 65,504; choose bf16 or fp32."))
        return {SAME_NAME: values}
