"""A model some of whose weights are quantized, whatever file holds it."""

from collections.abc import Mapping
from typing import Protocol

import torch

from checkpoints_convert.dequantize.directory_format import QuantizedWeight, Scheme
from megatron_qwen.checkpoint.read import TensorInfo


class QuantizedTensors(Protocol):
    """A TensorSet that dequantizes: its rows of quantized weights are float32."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name; float32 of a quantized weight."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, [stop - start, ...]; of a quantized weight, dequantized."""

    @property
    def weights(self) -> Mapping[str, QuantizedWeight]:
        """The quantized weights by name."""

    @property
    def scheme(self) -> Scheme:
        """How they are quantized."""

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in the file: of a quantized weight, its codes, scales, zeros and indices."""
