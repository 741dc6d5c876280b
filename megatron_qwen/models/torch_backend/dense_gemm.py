"""The products of a dense layer: torch's own, or on a CPU those of the library which is faster there."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend import formulas
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

# From so many rows and weights on, oneDNN's weight gradients pay for their transposed copies.
_LEAST_ROWS, _LEAST_WEIGHTS = 1024, 2**18


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x w' + bias, without autograd.

    Args:
        x: [n, k].
        weight: [m, k]; a transposed view costs no copy.
        bias: [m]; not with ``out``.
        out: where the result goes, [n, m]; None is a new tensor.
    """
    if _is_onednns(x, weight):
        product = _onednn(x, weight, bias)
        return product if out is None else out.copy_(product)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    return F.linear(x, weight, bias)


def add_weight_gradient_(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """total + gradient' x, in the place of ``total``, without autograd.

    oneDNN is the faster one here too, but copies a first factor whose rows are not contiguous, at torch's speed. In
    compiled runs a kernel copies the narrower of the two, where the product is large enough for it and for a tensor of
    its own.

    Args:
        total: [m, k], in the format of both factors.
        gradient: [n, m].
        x: [n, k].
    """
    m, k = total.shape
    transposed, add_transposed_ = PROCESS_KERNELS.of(formulas.transposed), PROCESS_KERNELS.of(formulas.add_transposed_)
    large = len(x) >= _LEAST_ROWS and m * k >= _LEAST_WEIGHTS
    narrow, wide = (gradient, x) if m < k else (x, gradient)
    if transposed is None or add_transposed_ is None or not large or not _is_onednns(narrow, wide):
        return total.addmm_(gradient.t(), x)
    product = _onednn(transposed(narrow), wide.t())
    if m < k:
        return total.add_(product)
    add_transposed_(total, product)
    return total


def _is_onednns(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether it takes both; a second factor with gaps between its rows or columns is a thousand times slower there."""
    dense = second.is_contiguous() or second.t().is_contiguous()
    return dense and first.device.type == "cpu" and first.dtype == second.dtype == torch.float32 and _onednn_pays()


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


@cache
def _onednn_pays() -> bool:
    """Whether fp32 goes to oneDNN. torch hands fp32 to MKL, whose kernels for AMD's processors are not its best.

    On two cores of an AMD EPYC 9004 oneDNN was 5 to 20 % faster for outputs and input gradients. bf16 is oneDNN's in
    torch as it is.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpuinfo = Path("/proc/cpuinfo")
    return there and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
