"""GPTQ: rounds the columns of a weight one by one and makes up for each error in the columns that follow.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. Rows do not depend on one another, so they are solved in parts.
"""

from dataclasses import dataclass

import torch

from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.quantize.layer_solution import CalibratedLayer, LayerSolution
from checkpoints_convert.quantize.quantized_rows import join_rows
from megatron_qwen.errors import ConversionError, Problem

# Damping where that asked for leaves the Hessian without a Cholesky factor: ten times as much, up to the mean diagonal.
_MORE_DAMPING, _MOST_DAMPING = 10.0, 1.0
_ROWS = 512  # of a weight that a thread solves; fixed, because another number would sum in another order


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ rounds.

    Args:
        damping: what is added to the Hessian's diagonal, in units of its mean.
        act_order: columns of the largest inputs first (``desc_act``); a column's group is then in ``group_of``.
        static_groups: scales of all groups before the first column is rounded, from the weight as it was. With
            ``act_order``, groups are then consecutive columns.
        true_sequential: linears see the inputs that the rounded linears before them in the layer give.
        block: columns whose errors reach the columns behind the block together.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    block: int = 128


@dataclass(frozen=True)
class Factor:
    """A Hessian, ready to solve with.

    Args:
        inverse: upper Cholesky factor of the damped Hessian's inverse, [in, in], in the order of the columns.
        order: [in], the columns in the order in which they are rounded; None: as they are.
        dead: [in], columns that are zero in every input.
        damping: what was added to the diagonal, in units of its mean.
    """

    inverse: torch.Tensor
    order: torch.Tensor | None
    dead: torch.Tensor
    damping: float


def factorize(hessian: torch.Tensor, options: GptqOptions, *, name: str) -> Factor | None:
    """The Cholesky factor of the inverse; changes ``hessian``.

    Args:
        hessian: [in, in], 2 X^T X / n. Three matrices of its size are in memory at the peak.
        options: damping and order.
        name: of the linear, for the message.

    Returns:
        None where every input is zero (an expert that no token reached): there is nothing to make up for.

    Raises:
        ConversionError: there is no factor even with much damping; inputs are not finite.
    """
    diagonal = hessian.diagonal()
    if not bool(diagonal.isfinite().all()):
        fix = "has inputs that are not finite in the calibration data: the weights of a layer before it are damaged."
        raise ConversionError(Problem(name, None, fix))
    dead = diagonal == 0
    if bool(dead.all()):
        return None
    diagonal[dead] = diagonal[~dead].mean()  # neither changes the damping of the others nor comes first
    order = None
    if options.act_order:
        order = diagonal.argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    mean, damping = float(hessian.diagonal().mean()), options.damping
    added = 0.0
    while True:
        hessian.diagonal().add_((damping - added) * mean)
        added = damping
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            break
        damping *= _MORE_DAMPING
        if damping > _MOST_DAMPING:
            fix = f"the Hessian has no Cholesky factor; give more damping than {options.damping}, or more samples."
            raise ConversionError(Problem(name, None, fix))
    inverse = torch.cholesky_inverse(factor)
    del factor
    return Factor(torch.linalg.cholesky(inverse, upper=True), order, dead, damping)


def solve(weight: torch.Tensor, factor: Factor, grid: Grid, options: GptqOptions) -> QuantizedLinear:
    """Rounds rows of a weight.

    Scales of a group are fitted when its first column is reached, to the weight with all corrections so far; those of
    ``static_groups``, and of a whole row, to the weight as it was.

    Args:
        weight: [out, in], the rows.
        factor: of the inputs' Hessian.
        grid: what values can be.
        options: order, groups and blocks.
    """
    # Columns are contiguous in memory: every step works on one of them.
    columns = weight.t().float().clone(memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    width = columns.shape[0]
    group = grid.group or width
    static = options.static_groups or grid.group is None
    fitted = list(_fitted(columns, grid, group)) if static else []
    group_of = torch.arange(width, device=columns.device) // group
    if factor.order is not None:
        columns = columns[factor.order]
        group_of = group_of[factor.order] if static else group_of
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    groups = group_of.tolist()
    for start, stop in _blocks(width, group, options.block):
        errors = torch.empty_like(columns[start:stop])
        for at in range(start, stop):
            if not static and at % group == 0:
                fitted += _fitted(columns[at : at + group], grid, group)
            scale, zero = fitted[groups[at]]
            column = columns[at]
            code = ((column / scale).round() + zero).clamp(0, grid.largest_code)
            codes[at] = code.to(torch.uint8)
            error = (column - (code - zero) * scale) / factor.inverse[at, at]
            errors[at - start] = error
            columns[at + 1 : stop].addr_(factor.inverse[at, at + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor.inverse[start:stop, stop:].t(), errors, alpha=-1)
    back = None if factor.order is None else factor.order.argsort()
    found = codes if back is None else codes[back]
    scales, zeros = (torch.stack(list(part), dim=1) for part in zip(*fitted, strict=True))
    named = None if back is None or static else group_of[back].to(torch.int32).cpu()
    return QuantizedLinear(found.t().contiguous().cpu(), scales.cpu(), zeros.to(torch.uint8).cpu(), named)


def _blocks(width: int, group: int, block: int) -> list[tuple[int, int]]:
    """Columns whose errors reach those behind together, at most ``block`` of them.

    A group ends with a block, or begins with one: where it is fitted, all of it has every correction so far.
    """
    if group <= block:
        step = block // group * group
        return [(start, min(start + step, width)) for start in range(0, width, step)]
    return [
        (start, min(start + block, first + group))
        for first in range(0, width, group)
        for start in range(first, first + group, block)
    ]


def _fitted(columns: torch.Tensor, grid: Grid, group: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero of every group of columns, float32 [out] each."""
    found = []
    for start in range(0, columns.shape[0], group):
        one = Grid(grid.bits, None, grid.symmetric, grid.scale_dtype)
        scale, zero = one.fit(columns[start : start + group].t())
        found.append((scale[:, 0], zero[:, 0].float()))
    return found


def solve_layer(layer: CalibratedLayer, grid: Grid, options: GptqOptions) -> LayerSolution:
    """Rounds the linears of a layer, and leaves the layer in memory with the rounded weights.

    Linears that come later in the layer see the inputs that the rounded ones before them give (``true_sequential``),
    and so do the layers behind it: each makes up for errors that are there in use. The price is four passes that end
    where the inputs are known, and one whole pass.

    Args:
        layer: the layer, with the inputs that the rounded layers before it give.
        grid: what values can be.
        options: how they are rounded.
    """
    solution = LayerSolution()
    stages = layer.stages if options.true_sequential else [[group for stage in layer.stages for group in stage]]
    for stage in stages:
        found: dict[str, QuantizedLinear] = {}
        for turn in layer.statistics(stage, hessian=True):
            for group, statistics in turn:
                factor = factorize(statistics.hessian(), options, name=group.watched)
                if factor is None:
                    solution.untouched += group.linears
                for name in group.linears:
                    found[name] = _solved(layer, name, factor, grid, options)
        for name, linear in found.items():
            layer.runner.replace(name, linear.values())
            solution.linears[f"{name}.weight"] = linear
    return solution


def _solved(
    layer: CalibratedLayer, name: str, factor: Factor | None, grid: Grid, options: GptqOptions
) -> QuantizedLinear:
    weight = layer.weight(f"{name}.weight")
    if factor is None:
        return grid.nearest(weight)
    # One launch after the other on a GPU, so rows are not divided there.
    rows = weight.split(_ROWS if weight.device.type == "cpu" else len(weight))
    return join_rows(layer.workers.map(lambda part: solve(part, factor, grid, options), rows))
