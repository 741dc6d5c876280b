"""GEMMs of linear layers: torch's own, or oneDNN's on CPUs where it is faster (``_onednn_pays``)."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend import formulas, invariant_gemm
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS, filled
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

# From this many rows and weights on, oneDNN's faster weight-gradient GEMM outweighs the transposed copy that it needs.
# Chosen by hand; docs/performance.md has what it gains in a step of two threads.
_LEAST_ROWS, _LEAST_WEIGHTS = 1024, 2**18


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x w' + bias, [n, m], without autograd.

    Args:
        x: [n, k].
        weight: [m, k]; may be a transposed view.
        bias: [m]; cannot be combined with ``out``.
        out: tensor for the result, [n, m]; None makes a new one.
    """
    if 0 < len(x) < INVARIANT_ROWS and x.device.type == "cpu":
        result = linear(filled(x), weight, bias)[: len(x)]
        return result if out is None else out.copy_(result)
    if _is_onednns(x, weight):
        result = _onednn(x, weight, bias)
        return result if out is None else out.copy_(result)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    return F.linear(x, weight, bias)


def add_weight_gradient_(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Adds gradient' x to ``total`` in place, [m, k], without autograd.

    oneDNN is faster here too, but it copies a first operand whose rows are not contiguous, slowly. In compiled runs a
    fast kernel transposes the narrower operand first, where the GEMM is large enough to pay for that and for a
    temporary result.

    Args:
        total: [m, k], in the format of both operands.
        gradient: [n, m].
        x: [n, k].
    """
    m, k = total.shape
    transposed, add_transposed_ = PROCESS_KERNELS.of(formulas.transposed), PROCESS_KERNELS.of(formulas.add_transposed_)
    large = len(x) >= _LEAST_ROWS and m * k >= _LEAST_WEIGHTS
    narrow, wide = (gradient, x) if m < k else (x, gradient)
    if transposed is None or add_transposed_ is None or not large or not _is_onednns(narrow, wide):
        return total.addmm_(gradient.t(), x)
    result = _onednn(transposed(narrow), wide.t())
    if m < k:
        return total.add_(result)
    add_transposed_(total, result)
    return total


def _is_onednns(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether to use oneDNN: fp32 on a CPU, and a second operand without gaps, with which it is 1000 times slower."""
    dense = second.is_contiguous() or second.t().is_contiguous()
    return dense and first.device.type == "cpu" and first.dtype == second.dtype == torch.float32 and _onednn_pays()


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


@cache
def _onednn_pays() -> bool:
    """Whether to send fp32 GEMMs to oneDNN: on AMD processors, for which MKL, torch's default, does not optimise.

    On two cores of an AMD EPYC 9004 oneDNN was 5 to 20 % faster for outputs and input gradients. torch already uses
    oneDNN for bf16.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return invariant_gemm.has_onednn() and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
