"""AWQ: scales the channels with large inputs up before rounding, then clips the weights of every group.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Both searches minimise the error of a linear's output on the
calibration data, ||Q(W diag(s)) diag(1 / s) X - W X||^2. With D the error of the weights it is the trace of D H D^T, so
the Hessian of the inputs (``hessian.py``) holds all that is needed of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.quantize.folding import FoldedWeights, folds
from checkpoints_convert.quantize.layer_plan import InputGroup
from checkpoints_convert.quantize.layer_solution import CalibratedLayer, LayerSolution
from checkpoints_convert.quantize.quantized_rows import join_rows

_SMALLEST = 1e-4
# Queries and keys meet in a product before the softmax; the authors' code does not clip them.
_NOT_CLIPPED = ("q_proj", "k_proj")
_ROWS = 512  # of a weight at a time in the search for clipping


@dataclass(frozen=True)
class AwqOptions:
    """What AWQ searches.

    Args:
        exponents: scales tried are mean|x|^(i / exponents), i from 0, which scales nothing.
        clip: search for the clipping of weights too.
        clip_steps: ranges tried are 1 - i / clip_steps of the largest weight of a group, down to half of it.
    """

    exponents: int = 20
    clip: bool = True
    clip_steps: int = 20


def candidate_scales(mean_absolute: torch.Tensor, options: AwqOptions) -> list[torch.Tensor]:
    """Scales of the channels to try, [in] each; the first are ones.

    Their largest and smallest value are each other's inverse, as in the authors' code: what matters is their ratio.
    Channels without input (of padding) have the scale 1 and no part in it.
    """
    found = []
    live = mean_absolute > 0
    if not bool(live.any()):
        return [torch.ones_like(mean_absolute)]
    for step in range(options.exponents):
        scales = mean_absolute.clamp(min=_SMALLEST) ** (step / options.exponents)
        middle = (scales[live].max() * scales[live].min()).sqrt()
        found.append((scales / middle).clamp(min=_SMALLEST).where(live, 1.0))
    return found


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Trace of D H D^T: the mean square error of a linear's output, summed over its rows, times two.

    Args:
        difference: D, [out, in].
        hessian: [in, in], 2 X^T X / n.
    """
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def scale_errors(
    weight: torch.Tensor, hessian: torch.Tensor, candidates: list[torch.Tensor], grid: Grid
) -> torch.Tensor:
    """Output error with every candidate of the scales, float64 [candidates]."""
    errors = []
    for scales in candidates:
        rounded = grid.nearest(weight * scales).values() / scales
        errors.append(output_error(rounded - weight, hessian))
    return torch.tensor(errors, dtype=torch.float64)


def clipped_nearest(weight: torch.Tensor, blocks: torch.Tensor, grid: Grid, options: AwqOptions) -> QuantizedLinear:
    """Rounds to nearest, every group clipped where that lowers the output error of the group alone.

    Args:
        weight: [out, in].
        blocks: [groups, group, group], the Hessian's blocks on the diagonal.
        grid: what values can be.
        options: how many ranges are tried.
    """
    groups = blocks.shape[0]
    best, best_error = weight, torch.full((weight.shape[0], groups), torch.inf, device=weight.device)
    largest = weight.unflatten(1, (groups, -1)).abs().amax(2, keepdim=True)
    for step in range(options.clip_steps // 2 + 1 if options.clip else 1):
        limit = largest * (1 - step / options.clip_steps)
        clipped = weight.unflatten(1, (groups, -1)).clamp(-limit, limit).flatten(1)
        difference = (grid.nearest(clipped).values() - weight).unflatten(1, (groups, -1))
        error = (torch.einsum("rgi,gij->rgj", difference, blocks) * difference).sum(2)
        better = (error < best_error)[:, :, None]
        best_error = torch.minimum(error, best_error)
        best = torch.where(better, clipped.unflatten(1, (groups, -1)), best.unflatten(1, (groups, -1))).flatten(1)
    return grid.nearest(best)


def solve_layer(layer: CalibratedLayer, grid: Grid, options: AwqOptions) -> LayerSolution:
    """Searches scales, folds them, then clips and rounds.

    Args:
        layer: the layer; statistics are those of the unquantized model, as in the paper.
        grid: what values can be.
        options: what is searched.
    """
    scaled = folds(layer)
    of_linear = {linear: fold for fold in scaled for linear in fold.linears}
    means = layer.module_statistics({fold.watched: fold.columns for fold in scaled})
    candidates = {fold: candidate_scales(means[fold.watched].mean_absolute, options) for fold in scaled}
    errors = {fold: torch.zeros(options.exponents, dtype=torch.float64) for fold in scaled}
    blocks: dict[str, torch.Tensor] = {}
    groups = [group for stage in layer.stages for group in stage]
    for turn in layer.statistics(groups, hessian=True):
        for group, statistics in turn:
            hessian = statistics.hessian()
            if grid.group is not None:
                blocks |= dict.fromkeys(group.linears, _diagonal_blocks(hessian, grid.group))
            for name in group.linears:
                if (fold := of_linear.get(name)) is not None:
                    errors[fold] += _scale_errors(layer, name, hessian, candidates[fold], grid)
    weights = FoldedWeights(layer)
    for fold in scaled:
        # An exponent of 0 comes first, so that it stays where nothing is better.
        weights.apply(fold, candidates[fold][int(errors[fold].argmin())])
    return LayerSolution(_rounded(layer, groups, weights, blocks, grid, options), dict(weights.changed))


def _scale_errors(
    layer: CalibratedLayer, name: str, hessian: torch.Tensor, candidates: list[torch.Tensor], grid: Grid
) -> torch.Tensor:
    weight = layer.weight(f"{name}.weight")
    found = layer.workers.map(lambda scales: scale_errors(weight, hessian, [scales], grid), candidates)
    return torch.cat(found)


def _rounded(
    layer: CalibratedLayer,
    groups: list[InputGroup],
    weights: FoldedWeights,
    blocks: Mapping[str, torch.Tensor],
    grid: Grid,
    options: AwqOptions,
) -> dict[str, QuantizedLinear]:
    found = {}
    for name in (name for group in groups for name in group.linears):
        weight, own = weights.linear(name), blocks.get(name)
        if own is None or not options.clip or name.endswith(_NOT_CLIPPED):
            found[f"{name}.weight"] = grid.nearest(weight)
            continue
        if (scales := weights.input_scales(name)) is not None:
            inverse = (1 / scales).unflatten(0, (own.shape[0], -1))
            own = own * inverse[:, :, None] * inverse[:, None, :]
        clip = partial(clipped_nearest, blocks=own, grid=grid, options=options)
        found[f"{name}.weight"] = join_rows(layer.workers.map(clip, weight.split(_ROWS)))
    return found


def _diagonal_blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """[in / group, group, group]."""
    starts = range(0, hessian.shape[0], group)
    return torch.stack([hessian[start : start + group, start : start + group] for start in starts])
