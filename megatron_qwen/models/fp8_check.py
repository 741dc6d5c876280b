"""Checks an FP8 GEMM against the same GEMM in fp64: error within what the formats allow, and not below what they cause.

``python -m megatron_qwen.models.fp8_check`` does it on the GPU and prints one line of JSON, for launch/fp8_proof.py.
"""

import json
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_qwen import device
from megatron_qwen.models.te_backend import provider as te_backend
from megatron_qwen.models.torch_backend.fp8_rounding import GRADIENTS, VALUES, tensorwise

# x [tokens, in], weight [out, in], gradient [tokens, out] -> y = x w', dx = g w, dw = g' x.
Gemms = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# Multiples of 16, which FP8 GEMMs require, and all different, so that no transposed operand goes unnoticed.
_TOKENS, _IN, _OUT = 512, 1024, 768
# Far from 1: without its scale the first and last would be rounded to zero and the second would overflow.
_MAGNITUDES = {"x": 1e-4, "weight": 1e3, "gradient": 1e-7}
# A GEMM that is not computed in FP8 has a fiftieth of the allowed error, FP8 of random numbers almost a half.
_FLOOR = 0.25


def operands(place: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and gradient in bf16: normal random numbers of three magnitudes, the same at every call.

    Args:
        place: device of the tensors; they are drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (_TOKENS, _IN), "weight": (_OUT, _IN), "gradient": (_TOKENS, _OUT)}
    x, weight, gradient = (
        (torch.randn(shape, generator=generator) * _MAGNITUDES[name]).bfloat16().to(place)
        for name, shape in shapes.items()
    )
    return x, weight, gradient


def allowed(first: torch.dtype, second: torch.dtype) -> float:
    """Largest relative error (Frobenius norm) of a GEMM whose operands were rounded to these formats.

    Rounding to nearest changes a value by at most half a unit of its last place: u = eps / 2 (2^-4 for E4M3, 2^-3 for
    E5M2). The errors of different elements are independent, so they do not add up along the summed dimension: the norm
    of the error is at most sqrt(u1^2 + u2^2) of that of the result. fp32 accumulation and the rounding of the result
    to bf16 (2^-9) are small beside it.
    """
    return float((torch.finfo(first).eps ** 2 + torch.finfo(second).eps ** 2) ** 0.5 / 2)


def problems(gemms: Gemms, place: torch.device) -> tuple[float, list[str]]:
    """Largest share of the allowed error that was used, and what is wrong.

    Args:
        gemms: what is checked.
        place: where.
    """
    x, weight, gradient = operands(place)
    exact = _exact(x.double(), weight.double(), gradient.double())
    limits = {
        "output (E4M3 x E4M3)": allowed(VALUES, VALUES),
        "input gradient (E5M2 x E4M3)": allowed(GRADIENTS, VALUES),
        "weight gradient (E5M2 x E4M3)": allowed(GRADIENTS, VALUES),
    }
    used, found = 0.0, []
    for (name, limit), got, wanted in zip(limits.items(), gemms(x, weight, gradient), exact, strict=True):
        error = float(((got.double() - wanted).norm() / wanted.norm()).item())
        used = max(used, error / limit)
        if not error <= limit:  # NaN too
            found.append(f"{name}: relative error {error:.3g}, the format allows {limit:.3g}: a scale is wrong")
        elif error < _FLOOR * limit:
            found.append(f"{name}: relative error {error:.3g}: it was not computed in FP8")
    return used, found


def _exact(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x @ weight.t(), gradient @ weight, gradient.t() @ x


def scaled_gemms(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three GEMMs by torch's own FP8 GEMM, one scale a tensor."""
    return (
        _scaled(x, VALUES, weight),
        _scaled(gradient, GRADIENTS, weight.t()),
        _scaled(gradient.t(), GRADIENTS, x.t()),
    )


def _scaled(a: torch.Tensor, a_format: torch.dtype, b: torch.Tensor) -> torch.Tensor:
    """a [m, k], b [n, k] -> a b' [m, n] in bf16."""
    left, right = tensorwise(a.contiguous(), a_format), tensorwise(b.contiguous(), VALUES)
    result: torch.Tensor = torch._scaled_mm(
        left.values, right.values.t(), scale_a=left.inverse, scale_b=right.inverse, out_dtype=torch.bfloat16
    )
    return result


def result() -> Iterator[tuple[str, str]]:
    """Fields of launch.fp8_proof.Proof, of the check on this machine's GPU."""
    cuda = torch.version.cuda
    if not device.has_cuda():
        yield "state", "wrong"
        yield "found", f"torch {torch.__version__} (CUDA {cuda}) finds no GPU"
        yield "fix", "CUDA_VISIBLE_DEVICES must name one, and the driver must run torch's CUDA: ./mq setup --gpu."
        return
    if (reason := te_backend.why_not_fp8("tensorwise")) is not None:
        yield "state", "not tried"
        yield "found", f"not tried: {reason}"
        return
    # An installed Transformer Engine that cannot be imported ends this with its traceback.
    engine = te_backend.is_installed()
    used, found = problems(te_backend.fp8_gemms if engine else scaled_gemms, device.current())
    how = f"Transformer Engine {_engine()}" if engine else f"torch {torch.__version__} without Transformer Engine"
    if found:
        yield "state", "wrong"
        yield "found", f"{how} on {device.device_name()}: {'; '.join(found)}"
        yield (
            "fix",
            "report it with the versions of driver, torch and Transformer Engine; train with precision.fp8=null.",
        )
        return
    yield "state", "ok"
    yield "found", f"{how} on {device.device_name()}, CUDA {cuda}: {100 * used:.0f} % of the allowed rounding error"


def _engine() -> str:
    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    print(json.dumps(dict(result())))
