"""Grouped GEMMs: groups of rows, each times its own matrix, as one kernel where torch has one for the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_qwen import device
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS, filled

# Compute capability from which grouped_mm is used (Hopper). It needs the weights of all experts in one tensor, which
# costs a copy that the loop does not need.
_KERNEL_FROM_CAPABILITY = (9, 0)


def weighed(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[n, f] times [n]: multiplied in the routing weights' precision (fp32), then rounded to the format of the rows."""
    return (x * probs.unsqueeze(-1)).to(x.dtype)


def grouped_gemm(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int], *, kernel: bool | None = None
) -> torch.Tensor:
    """Grouped GEMM: each group of rows times its transposed weight.

    Args:
        rows: [n, inner], sorted by group.
        weights: [outer, inner] of each group.
        counts: rows of each group; their sum is n.
        kernel: whether to use grouped_mm; None decides by device and format.

    Returns:
        [n, outer].
    """
    if _one_kernel(rows, len(weights[0])) if kernel is None else kernel:
        return F.grouped_mm(rows, torch.stack(tuple(weights)).transpose(-2, -1), offs=_ends(counts, rows.device))
    result = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for weight, begin, end in zip(weights, *_bounds(counts), strict=True):
        if end - begin >= INVARIANT_ROWS:
            torch.mm(rows[begin:end], weight.t(), out=result[begin:end])
        elif end > begin:
            result[begin:end] = torch.mm(filled(rows[begin:end]), weight.t())[: end - begin]
    return result


def grouped_weight_gradients(
    gradients: torch.Tensor, rows: torch.Tensor, counts: Sequence[int], *, kernel: bool | None = None
) -> list[torch.Tensor]:
    """Weight gradients of a grouped GEMM: transposed output gradients of each group times its rows.

    Args:
        gradients: gradients of the output, [n, outer].
        rows: [n, inner].
        counts: rows of each group; their sum is n.
        kernel: as for ``grouped_gemm``.

    Returns:
        [outer, inner] of each group; zeros where it has no row.
    """
    if _one_kernel(rows, gradients.shape[1]) if kernel is None else kernel:
        return list(F.grouped_mm(gradients.t(), rows, offs=_ends(counts, rows.device)).unbind())
    return [gradients[begin:end].t() @ rows[begin:end] for begin, end in zip(*_bounds(counts), strict=True)]


def _one_kernel(rows: torch.Tensor, outer: int) -> bool:
    # grouped_mm supports bf16 only, and requires rows aligned to 16 bytes (8 elements).
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[1] % 8 or outer % 8:
        return False
    return device.compute_capability() >= _KERNEL_FROM_CAPABILITY


def _bounds(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """First row of each group, and the row after its last."""
    begins, ends, end = [], [], 0
    for count in counts:
        begins.append(end)
        end += count
        ends.append(end)
    return begins, ends


def _ends(counts: Sequence[int], place: torch.device) -> torch.Tensor:
    return torch.tensor(_bounds(counts)[1], dtype=torch.int32, device=place)
