"""How far a quantized weight is from the original, measured on the weight's own grid.

Rounding to nearest on the same scales and zeros is the yardstick: a method that compensates errors (GPTQ) is somewhat
farther from the weight than that, a weight that was packed or scaled wrongly is many times farther.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from checkpoints_convert.dequantize.quantized_rows import QuantizedRows
from checkpoints_convert.dequantize.quantized_tensors import QuantizedTensors
from checkpoints_convert.tensor_set import TensorSet

# Of float32 at a time. What is computed with it takes about twelve times as much.
_BLOCK_BYTES = 1 << 22
# Added to the error of rounding to nearest, in steps, so that weights that lie on the grid have a yardstick too. The
# error of rounding is 0.29 steps (1 / sqrt 12).
_FLOOR_STEPS = 0.05
# What rounding moves a weight by at most where it is within the grid: half a step of integers, 1 / 16 of an e4m3 value.
_ROUNDED_STEPS, _ROUNDED = 0.51, 2.0**-4
# Columns of one scale in which a factor is fitted.
_GAIN_COLUMNS = 32


@dataclass(frozen=True)
class GridError:
    """A quantized weight against the original.

    Args:
        name: of the weight.
        values: how many.
        relative: root mean square of the error, in units of that of the weight.
        nearest: what rounding to nearest on the same scales and zeros would give.
        ratio: ``relative`` by ``nearest``.
        worst_row: the largest such ratio of a row.
        bias: mean distance from the nearest values, in steps of the grid: 0 of rounding to nearest, 1 where every zero
            is off by one.
        gain: of weights within the grid, the share of the squared error that is distance from the nearest values and
            that a factor for every 32 columns of a row would remove: 0 of rounding to nearest, 1 / 32 of compensated
            errors, which have nothing to do with the weight, and most of it where scales belong to other columns.
    """

    name: str
    values: int
    relative: float
    nearest: float
    ratio: float
    worst_row: float
    bias: float
    gain: float

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass
class _Sums:
    """What is summed over blocks of rows; float64."""

    weight: float = 0.0
    error: float = 0.0
    nearest: float = 0.0
    floor: float = 0.0
    steps: float = 0.0
    gain: float = 0.0
    inside: float = 0.0
    worst_row: float = 0.0
    values: int = 0
    row_factors: list[torch.Tensor] = field(default_factory=list)


def measure(
    reference: TensorSet,
    quantized: QuantizedTensors,
    name: str,
    *,
    columns: torch.Tensor | None = None,
    fit_rows: bool = False,
) -> tuple[GridError, torch.Tensor | None]:
    """Compares a weight block by block of rows; memory is about 50 MiB, whatever its size.

    Args:
        reference: the original.
        quantized: holds the weight quantized.
        name: of the weight.
        columns: float32 [in], what the original's columns are to be multiplied by before they are compared.
        fit_rows: whether rows may have been multiplied too: by the factor that fits best.

    Returns:
        The measurement, and the factors of the rows, float32 [out], where they were fitted.
    """
    sums = _Sums()
    for original, rows in _blocks(reference, quantized, name):
        if columns is not None:
            original = original * columns
        _add(sums, original, rows, fit_rows=fit_rows)
    ratio = (sums.error / max(sums.nearest + sums.floor, 1e-60)) ** 0.5
    scale = max(sums.weight, 1e-60)
    found = GridError(
        name,
        sums.values,
        relative=(sums.error / scale) ** 0.5,
        nearest=(sums.nearest / scale) ** 0.5,
        ratio=ratio,
        worst_row=sums.worst_row,
        bias=sums.steps / max(1, sums.values),
        gain=sums.gain / max(sums.inside, 1e-60),
    )
    return found, torch.cat(sums.row_factors) if fit_rows else None


def _blocks(
    reference: TensorSet, quantized: QuantizedTensors, name: str
) -> Iterator[tuple[torch.Tensor, QuantizedRows]]:
    rows, width = reference.tensors[name].shape
    step = max(1, _BLOCK_BYTES // (4 * width))
    weight = quantized.weights[name]
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield reference.rows(name, start, stop).float(), weight.rows(start, stop)


def _add(sums: _Sums, original: torch.Tensor, rows: QuantizedRows, *, fit_rows: bool) -> None:
    """Adds a block, [n, in]."""
    values, step = rows.values(), rows.step()
    if fit_rows:
        # Weights that a search for clipping cut would make every factor too small.
        kept = original * rows.inside()
        square = kept.square().sum(1)
        factor = torch.where(square > 0, (values * kept).sum(1) / square, 1.0)
        sums.row_factors.append(factor)
        original = original * factor[:, None]
    error = values - original
    squares = error.square()
    closest = rows.nearest(original)
    nearest, moved = (closest - original).square(), values - closest
    floor = (_FLOOR_STEPS * step).square().expand_as(error)
    by_row = [one.sum(1).double() for one in (squares, nearest, floor)]
    worst = (by_row[0] / (by_row[1] + by_row[2]).clamp(min=1e-60)).max().sqrt()
    sums.worst_row = max(sums.worst_row, float(worst.nan_to_num(nan=torch.inf)))
    sums.error += float(by_row[0].sum())
    sums.nearest += float(by_row[1].sum())
    sums.floor += float(by_row[2].sum())
    sums.weight += float(original.square().sum(1).double().sum())
    sums.steps += float((moved / step).sum(1).double().sum())
    sums.values += error.numel()
    # Where the grid reaches: a factor shows there even if the grid ends below the largest weights.
    inside = (closest - original).abs() <= torch.maximum(_ROUNDED_STEPS * step, _ROUNDED * original.abs())
    sums.gain += _explained(original * inside, moved * inside, rows.scales)
    sums.inside += float((squares * inside).sum(1).double().sum())


def _explained(original: torch.Tensor, moved: torch.Tensor, scales: torch.Tensor) -> float:
    """What a factor for every 32 columns of one scale explains: the sum of <moved, weight>^2 / <weight, weight>."""
    width = original.shape[1]
    if scales.shape[-1] == width and width > 1:
        # Columns of one group are brought together; all rows have the same groups.
        order = scales[0].argsort(stable=True)
        original, moved = original[:, order], moved[:, order]
    whole = width // _GAIN_COLUMNS * _GAIN_COLUMNS
    if not whole:
        return 0.0
    weight, apart = (one[:, :whole].unflatten(1, (-1, _GAIN_COLUMNS)) for one in (original, moved))
    square = weight.square().sum(2)
    return float(((apart * weight).sum(2).square() / square.clamp(min=1e-30)).sum(1).double().sum())
