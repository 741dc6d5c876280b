"""The product of a dense layer, x w': torch's own, or on a CPU that of the library which is faster there."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F


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
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _onednn_pays():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    return F.linear(x, weight, bias)


@cache
def _onednn_pays() -> bool:
    """Whether fp32 goes to oneDNN. torch hands fp32 to MKL, whose kernels for AMD's processors are not its best.

    On two cores of an AMD EPYC 9004 oneDNN was 5 to 20 % faster for outputs and input gradients, and slower for weight
    gradients. bf16 is oneDNN's in torch as it is.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpuinfo = Path("/proc/cpuinfo")
    return there and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
