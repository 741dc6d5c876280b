"""The fastest way on this machine to multiply a few rows by a weight, with the bits of the training forward.

On a CPU a product of 4 to 64 rows is bound by reading the weight, and libraries differ by factors: MKL takes 0.3 ms for
4 rows of 384 times [640, 384] as training stores a weight, 0.04 ms where it is stored transposed; oneDNN 0.17 ms, or
0.12 ms with the weight in its own order (two cores of an Intel Xeon with AVX-512). But the results' bits may differ as
well. So each way is tried for every shape of weight, and taken where it gives the bits of ``invariant_gemm`` for every
number of rows that it is used for, and is the fastest.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from megatron_qwen.models.torch_backend import dense_gemm, invariant_gemm
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS, filled

type Product = Callable[[torch.Tensor], torch.Tensor]
type Way = Callable[[torch.Tensor, torch.Tensor | None], Product]

FEW = 64  # rows; with more the product is bound by arithmetic, and copies gain nothing
_COUNTS = (4, 8, 12, 16, 24, 32, 48, FEW)
_TIMED_S = 0.01


class Products:
    """Makes products with weights.

    Args:
        room_bytes: that copies of weights may take; a weight that finds no room is used as it is stored.

    Attributes:
        copied_bytes: that copies take.
    """

    def __init__(self, room_bytes: int) -> None:
        self.copied_bytes = 0
        self._room = room_bytes
        self._chosen: dict[tuple[object, ...], Way | None] = {}

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """A weight [m, k] and a bias [m] or None -> rows [n, k], n of 4 and more -> [n, m]."""
        many: Product = partial(_as_stored, weight, bias)
        if not invariant_gemm.concerns(weight) or self.copied_bytes + weight.nbytes > self._room:
            return many
        shape = (*weight.shape, bias is None)
        if shape not in self._chosen:
            self._chosen[shape] = _fastest(weight, bias)
        way = self._chosen[shape]
        if way is None:
            return many
        self.copied_bytes += weight.nbytes
        return partial(_few_or_many, way(weight, bias), many)


def _few_or_many(few: Product, many: Product, rows: torch.Tensor) -> torch.Tensor:
    count = len(rows)
    if count > FEW:
        return many(rows)
    return few(rows) if count in _COUNTS else few(filled(rows, _next(count)))[:count]


def _next(count: int) -> int:
    return next(more for more in _COUNTS if more >= count)


def _as_stored(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    if invariant_gemm.concerns(rows):
        return invariant_gemm.linear(rows, weight, bias)
    return dense_gemm.linear(rows, weight, bias)


def _transposed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    stored = weight.t().contiguous()
    if bias is None:
        return lambda rows: torch.mm(rows, stored)
    return lambda rows: torch.mm(rows, stored).add_(bias)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    stored, compute = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: compute(rows, stored, bias, "none", [], "")


_WAYS: tuple[Way, ...] = (_transposed, _packed)


def _fastest(weight: torch.Tensor, bias: torch.Tensor | None) -> Way | None:
    """The fastest way with the right bits; None is the weight as it is stored."""
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * FEW, weight.shape[1], generator=dice)
    expected = invariant_gemm.linear(rows, weight, bias)
    best, least = None, _seconds(partial(_as_stored, weight, bias), rows)
    for way in _WAYS:
        product = way(weight, bias)
        if all(torch.equal(product(rows[:count]), expected[:count]) for count in _COUNTS):
            seconds = _seconds(product, rows)
            if seconds < least:
                best, least = way, seconds
    return best


def _seconds(product: Product, rows: torch.Tensor) -> float:
    """Of a product of few rows, the least of several tries."""
    found: list[float] = []
    few = rows[: 2 * INVARIANT_ROWS]
    end = time.perf_counter() + _TIMED_S
    while len(found) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        product(few)
        found.append(time.perf_counter() - begin)
    return min(found)
