"""What a calibrated method leaves for whoever writes the files: layers on a format's grid, and weights it altered."""

from typing import Protocol

import torch

from checkpoints_convert.formats.quantized_linear import QuantizedLinear


class SolvedLayers(Protocol):
    """Layers that a method has found, from its store on the disk; asked for from several threads."""

    @property
    def digest(self) -> str:
        """A hash that differs where the layers differ: of the model, the calibration data, the method, its options."""

    def prepare(self) -> None:
        """Finds the layers, or those that an earlier attempt has not found; called before any is asked for."""

    def linear(self, name: str) -> QuantizedLinear:
        """The codes of a quantized weight, by its Hugging Face name (``...q_proj.weight``); of the padded shape."""

    def changed(self, name: str) -> torch.Tensor | None:
        """A tensor that is not quantized and that the method altered (a norm, a bias); None of all others."""
