"""A weight and inputs whose columns are correlated and of different sizes, as those of a trained model are."""

import torch

from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from checkpoints_convert.layerwise.workers import Workers
from checkpoints_convert.quantize.hessian import InputStatistics

CPU = torch.device("cpu")


def weight_and_inputs(rows: int = 96, columns: int = 256, tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] and [tokens, columns]."""
    generator = torch.Generator().manual_seed(11)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing.t()
    inputs[:, ::37] *= 8
    return torch.randn(rows, columns, generator=generator) / columns**0.5, inputs


def statistics_of(inputs: torch.Tensor, *, hessian: bool = True, workers: int = 2, parts: int = 4) -> InputStatistics:
    """Summed in several parts."""
    with Workers(workers) as pool:
        found = InputStatistics(inputs.shape[1], hessian=hessian, workers=pool, place=CPU)
        for part in inputs.chunk(parts):
            found.add(part)
    return found


def error_of(linear: QuantizedLinear | torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """Mean square error of the output."""
    values = linear if isinstance(linear, torch.Tensor) else linear.values()
    return float((inputs @ (values - weight).t()).square().mean())
