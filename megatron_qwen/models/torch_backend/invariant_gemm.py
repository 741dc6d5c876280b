"""GEMMs on a CPU whose rows do not depend on which other rows are there, nor on how many.

MKL and oneDNN choose their code by the shape. A product of 4 rows may therefore sum in another order than the same rows
among 2,048, and token-by-token decoding would not give the bits of a whole text. What was found on two cores of an
Intel Xeon with AVX-512, also with both libraries held to AVX2:

- oneDNN's fp32 products of two rows and more have the same bits for every number of rows. MKL's have not: with AVX-512
  they depend on it up to 600 rows where the inner dimension exceeds 384.
- MKL's batched products, whose inner dimension is at most 256 here, have the same bits for 64 rows and multiples of it
  with AVX-512; with AVX2 for some numbers of columns only. Which smaller numbers of rows give them as well depends on
  the processor, too, so both are tried. The second operand has to lie as it is multiplied, and the batch must have two
  members: one is computed by other code.

``inference/exactness.py`` asks the machine itself.
"""

from functools import cache

import torch
import torch.nn.functional as F

INVARIANT_ROWS = 4  # of a product with a weight
INNER = 256  # of a batched product: longer ones are added up in parts
_MANY = 64  # rows of a batched product, and multiples of it, as training has them
_FEWER = (4, 8, 12, 16, 24, 32, 48)
_WIDE = 256  # columns at a time: how many there are may decide as well, and few numbers have to be tried
_PART = 64  # columns at a time, where so many do not give the same bits for all numbers of rows


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's fp32 product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def concerns(x: torch.Tensor) -> bool:
    """Whether products of this tensor are computed here: fp32 on a CPU, with oneDNN."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and has_onednn()


def filled(rows: torch.Tensor, least: int = INVARIANT_ROWS) -> torch.Tensor:
    """Rows [..., n, k] with rows of zeros behind them, up to ``least``; themselves where they are as many."""
    missing = least - rows.shape[-2]
    return F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x w' + bias, [..., m], of tensors that ``concerns`` is true of; without autograd.

    Args:
        x: [..., k].
        weight: [m, k]; may be a transposed view.
        bias: [m].
    """
    if x.dim() != 2:
        return linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN is 1000 times slower with gaps
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(filled(x), weight, bias, "none", [], "")
    return out[: len(x)]


def batched(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Products of a batch, [b, n, k] times [b, k, m] -> [b, n, m]; without autograd.

    Args:
        first: whose rows do not depend on each other, in fp32 on a CPU; else this is torch's product.
        second: the other operands.
    """
    if not is_batched_here(first):
        return torch.bmm(first, second)
    count, rows, inner = first.shape
    columns, second = second.shape[2], second if second.stride(2) == 1 else second.contiguous()
    if count == 1:
        first, second = (operand.expand(2, -1, -1) for operand in (first, second))
    parts, begin = [], 0
    while begin < columns:
        wide = min(_WIDE, columns - begin)
        some = second[:, :, begin : begin + (wide if _same(inner, wide) else _PART)]
        more = filled(first, _rows(rows, inner, some.shape[2]))
        out = torch.bmm(more[:, :, :INNER], some[:, :INNER])
        for start in range(INNER, inner, INNER):
            out.baddbmm_(more[:, :, start : start + INNER], some[:, start : start + INNER])
        parts.append(out[:count, :rows])
        begin += some.shape[2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def is_one(first: torch.Tensor, columns: int) -> bool:
    """Whether a batched product of two members and more is one call of torch's, if its rows are as many as they must.

    Args:
        first: its first operands, [b, n, k].
        columns: of the second.
    """
    inner = first.shape[2]
    return not is_batched_here(first) or (inner <= INNER and columns <= _WIDE and _same(inner, columns))


def batched_rows(rows: int, inner: int, columns: int) -> int:
    """How many rows a batched product on a CPU is filled up to, so that their bits do not depend on it.

    Args:
        rows: that are wanted.
        inner: dimension that is summed over.
        columns: of the second operands.
    """
    wide = min(columns, _WIDE)
    return _rows(rows, inner, wide if _same(inner, wide) else min(wide, _PART))


def is_batched_here(first: torch.Tensor) -> bool:
    """Whether batched products of these operands are computed here: fp32 on a CPU."""
    return first.device.type == "cpu" and first.dtype == torch.float32


def _same(inner: int, columns: int) -> bool:
    return columns <= _PART or _MANY in _good(min(inner, INNER), columns)


def _rows(rows: int, inner: int, columns: int) -> int:
    if rows > _MANY // 2:
        return rows + -rows % _MANY
    return next((count for count in _good(min(inner, INNER), columns) if count >= rows), _MANY)


@cache
def _good(inner: int, columns: int) -> tuple[int, ...]:
    """Numbers of rows that give the bits of many on this machine; none where 64, 128 and 192 rows differ."""
    dice = torch.Generator().manual_seed(inner)
    first = torch.randn(2, 3 * _MANY, inner, generator=dice)
    second = torch.randn(2, inner, columns, generator=dice)
    many = torch.bmm(first, second)
    few = {count: torch.bmm(first[:, :count].contiguous(), second) for count in (*_FEWER, _MANY, 2 * _MANY)}
    same = [count for count, found in few.items() if torch.equal(found, many[:, :count])]
    return tuple(count for count in same if 2 * _MANY in same and count <= _MANY)
