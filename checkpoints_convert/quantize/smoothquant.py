"""SmoothQuant: moves the range of outlying input channels into the weights, so that both can be int8.

Xiao et al. 2022, https://arxiv.org/abs/2211.10438: s = max|x|^alpha / max|w|^(1 - alpha) for every channel that a norm
makes, folded into the norm.
"""

import torch

from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.quantize.folding import Fold, FoldedWeights, folds
from checkpoints_convert.quantize.layer_solution import CalibratedLayer, LayerSolution

_SMALLEST = 1e-5


def smoothing_scales(largest_input: torch.Tensor, largest_weight: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) of every channel, [in]; 1 where the inputs are all zero.

    Args:
        largest_input: [in].
        largest_weight: [in], over all linears that read the channel.
        alpha: how much of the range moves into the weights; 0 none, 1 all of it.
    """
    scales = largest_input.clamp(min=_SMALLEST) ** alpha / largest_weight.clamp(min=_SMALLEST) ** (1 - alpha)
    return torch.where(largest_input > 0, scales.clamp(min=_SMALLEST), 1.0)


def solve_layer(layer: CalibratedLayer, grid: Grid, *, alpha: float) -> LayerSolution:
    """Folds the scales of a layer into its norms, then rounds to nearest.

    Args:
        layer: the layer; statistics are those of the unquantized model.
        grid: what values can be.
        alpha: as of ``smoothing_scales``.
    """
    norms = [fold for fold in folds(layer) if fold.is_norm]
    statistics = layer.module_statistics({fold.watched: fold.columns for fold in norms})
    weights = FoldedWeights(layer)
    for fold in norms:
        largest = statistics[fold.watched].largest
        weights.apply(fold, smoothing_scales(largest, _largest_weight(layer, fold), alpha=alpha))
    linears = [name for stage in layer.stages for group in stage for name in group.linears]
    rounded = layer.workers.map(lambda name: grid.nearest(weights.linear(name).cpu()), linears)
    return LayerSolution(
        {f"{name}.weight": linear for name, linear in zip(linears, rounded, strict=True)}, dict(weights.changed)
    )


def _largest_weight(layer: CalibratedLayer, fold: Fold) -> torch.Tensor:
    found = torch.zeros(fold.columns, device=layer.runner.place)
    for name in fold.linears:
        found = torch.maximum(found, layer.weight(f"{name}.weight").abs().amax(0))
    return found
