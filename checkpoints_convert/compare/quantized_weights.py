"""Compares a model with its quantized release, weight by weight on the release's own grid."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints_convert.compare.fold import Folds, find_folds, norm_before, partner_of
from checkpoints_convert.compare.grid_error import GridError, measure
from checkpoints_convert.compare.quantized_limits import weight_fault
from checkpoints_convert.compare.tensor_difference import Difference, value_difference
from checkpoints_convert.dequantize.directory_format import Scheme
from checkpoints_convert.dequantize.quantized_tensors import QuantizedTensors
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.sections import ModelConfig

WORST = 10
# Rounding of one 16-bit format to another, and of a factor to 16 bits, relative to the largest value.
_CAST = 2.0**-8
_SCALED = 2.0**-6
# Factors of rows that were fitted are wrong by the relative error by the square root of the columns; so many times that
# is no scale.
_FITTED = 3.0
_LARGEST_OF_MANY = 5.0  # of thousands of factors, in units of that noise


@dataclass
class WeightSummary:
    """What the comparison of quantized weights found.

    Args:
        scheme: how they are quantized.
        scaled_norms: norms whose scales were moved into the weights behind them.
        errors: of every weight.
    """

    scheme: Scheme
    scaled_norms: int = 0
    errors: list[GridError] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.errors:
            return ""
        most = max(self.errors, key=lambda error: error.relative)
        line = (
            f"{len(self.errors):,} quantized weights ({self.scheme}): relative error {self._mean:.4f} (worst "
            f"{most.relative:.4f}, {max(error.ratio for error in self.errors):.2f} times rounding to nearest at most), "
            f"mean shift {max(abs(error.bias) for error in self.errors):.3f} steps at most"
        )
        if self.scaled_norms:
            line += (
                f"\n{self.scaled_norms:,} norms were scaled, as AWQ and SmoothQuant do: weights were compared after "
                "the scales of norms and neighbouring weights were undone"
            )
        return line

    @property
    def _mean(self) -> float:
        values = sum(error.values for error in self.errors)
        return float((sum(error.relative**2 * error.values for error in self.errors) / max(1, values)) ** 0.5)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        worst = sorted(self.errors, key=lambda error: -error.ratio)[:WORST]
        return {
            "scheme": str(self.scheme),
            "precision": self.scheme.precision,
            "weights": len(self.errors),
            "relative_error": self._mean if self.errors and math.isfinite(self._mean) else None,
            "scaled_norms": self.scaled_norms,
            "worst": [error.as_json() for error in worst],
        }


class WeightComparison:
    """A model and its quantized release.

    Args:
        reference: the original.
        quantized: the release.
        model: its shape.
        tolerance: of tensors that are not quantized, in units of the largest value.
    """

    def __init__(
        self, reference: TensorSet, quantized: QuantizedTensors, model: ModelConfig, *, tolerance: float
    ) -> None:
        self._reference, self._quantized, self._tolerance = reference, quantized, tolerance
        self._folds: Folds = find_folds(reference, quantized, model)
        # A method that scales neighbours may leave the norms alone.
        self._may_scale = quantized.scheme.may_fold or bool(self._folds.norms)
        self._noise: dict[str, float] = {}
        self.summary = WeightSummary(quantized.scheme, len(self._folds.norms))

    def groups(self, names: list[str]) -> Iterator[list[str]]:
        """The tensors in groups: within one, the later ones need what was found of the earlier."""
        present = set(names)
        followers: dict[str, list[str]] = {}
        for name in names:
            before = self._before(name)
            if before in present:
                followers.setdefault(before or "", []).append(name)
        later = {name for group in followers.values() for name in group}
        for name in names:
            if name not in later:
                yield [name, *followers.get(name, ())]

    def _before(self, name: str) -> str | None:
        if name.endswith("v_proj.bias"):
            return name.removesuffix("bias") + "weight"
        return partner_of(name)

    def compare(self, name: str) -> tuple[GridError | None, Difference | None]:
        """A tensor: its error where it is quantized, and what is wrong with it."""
        shapes = [side.tensors[name].shape for side in (self._reference, self._quantized)]
        if shapes[0] != shapes[1]:
            detail = f"has the shapes {list(shapes[0])} and {list(shapes[1])}"
            return None, Difference("tensor", name, detail)
        if name not in self._quantized.weights:
            return None, self._plain(name)
        fit = self._may_scale and name.endswith((".up_proj.weight", ".v_proj.weight"))
        columns = self._folds.columns(name)
        error, rows = measure(self._reference, self._quantized, name, columns=columns, fit_rows=fit)
        if rows is not None and self._are_scaled(rows, error):
            self._folds.rows[name] = rows
        fault = weight_fault(error, self._quantized.scheme.precision)
        return error, None if fault is None else Difference("tensor", name, fault, _size(error.relative))

    def _are_scaled(self, rows: torch.Tensor, error: GridError) -> bool:
        """Whether factors of rows are more than what a fit makes of the error of rounding."""
        noise = error.relative / (error.values / len(rows)) ** 0.5
        self._noise[error.name] = noise
        return not float((rows - 1).square().mean().sqrt()) <= _FITTED * noise

    def _plain(self, name: str) -> Difference | None:
        """A tensor that is not quantized: equal bits, or within a rounding where formats or scales differ."""
        if name in self._folds.norms:
            factors = self._folds.norms[name]
            if bool((factors.isfinite() & (factors > 0)).all()):
                return None  # judged by the weights behind it, from which the factors must have been taken
            return Difference("tensor", name, "differs by factors that are not above 0, so it was not only scaled")
        dtypes = {side.tensors[name].dtype for side in (self._reference, self._quantized)}
        reference, tolerance = self._scaled(name)
        found = value_difference(reference, self._quantized, name)
        most = max(self._tolerance, tolerance, _CAST if len(dtypes) > 1 else 0.0)
        if found is None or (most and found.size <= most):
            return None
        told = f"{found.detail}; tolerance {most:g}"
        return Difference("tensor", name, told, found.size)

    def _scaled(self, name: str) -> tuple[TensorSet, float]:
        """The reference with the factors that a tensor should have, and the tolerance that goes with them."""
        columns = self._folds.norms.get(norm_before(name) or "") if not name.endswith("bias") else None
        rows = self._folds.rows.get(name.removesuffix("bias") + "weight") if name.endswith("v_proj.bias") else None
        if columns is None and rows is None:
            return self._reference, 0.0
        noise = _LARGEST_OF_MANY * self._noise.get(name.removesuffix("bias") + "weight", 0.0)
        return _Scaled(self._reference, columns, rows), max(_SCALED, noise)


def _size(relative: float) -> float:
    return relative if math.isfinite(relative) else math.inf


@dataclass(frozen=True)
class _Scaled:
    """A model whose tensors are multiplied by factors as they are read."""

    source: TensorSet
    by_column: torch.Tensor | None
    by_row: torch.Tensor | None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """As in the source."""
        return self.source.tensors

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor times the factors."""
        found = self.source.rows(name, start, stop).float()
        if self.by_row is not None:
            return found * self.by_row[start:stop]
        return found if self.by_column is None else found * self.by_column
