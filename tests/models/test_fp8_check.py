"""The FP8 check of an installation, on emulated FP8: right results pass, and every wrong one is found."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_qwen.models import fp8_check
from megatron_qwen.models.fp8_check import allowed, operands, problems, scaled_gemms
from megatron_qwen.models.torch_backend.fp8_rounding import GRADIENTS, VALUES, Scaled, tensorwise
from tests.conftest import run

CPU = torch.device("cpu")


def emulated(change=lambda scaled: scaled, cast=tensorwise):
    """The three GEMMs as the torch backend emulates them.

    Args:
        change: what goes wrong with the weight.
        cast: how values become FP8.
    """

    def gemms(x, weight, gradient):
        x8, w8, g8 = cast(x, VALUES), change(cast(weight, VALUES)), cast(gradient, GRADIENTS)
        x8, w8, g8 = x8.dequantised(), w8.dequantised(), g8.dequantised()
        return (x8 @ w8.t()).bfloat16(), (g8 @ w8).bfloat16(), (g8.t() @ x8).bfloat16()

    return gemms


def test_emulated_fp8_passes_within_half_of_what_is_allowed():
    used, found = problems(emulated(), CPU)
    assert found == []
    assert 0.3 < used < 0.6


@pytest.mark.parametrize(("factor", "outputs"), [(2.0, 2), (0.5, 2), (-1.0, 2), (1.1, 1), (0.9, 1)])
def test_a_wrong_scale_of_the_weight_is_found(factor, outputs):
    """In the output; in the input gradient, whose bound is that of E5M2, where it is far off; there is no third."""
    _, found = problems(emulated(lambda scaled: replace(scaled, inverse=scaled.inverse * factor)), CPU)
    assert len(found) == outputs
    assert found[0].startswith("output")
    assert all("a scale is wrong" in problem for problem in found)


def test_a_cast_without_scales_is_found():
    def bare(x, dtype):
        return Scaled(x.to(dtype), torch.ones(()), None)

    _, found = problems(emulated(cast=bare), CPU)
    assert len(found) == 3


def test_a_product_that_is_not_in_fp8_is_found():
    _, found = problems(in_bf16, CPU)
    assert len(found) == 3
    assert all("not computed in FP8" in problem for problem in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found(value):
    def broken(x, weight, gradient):
        y, *others = emulated()(x, weight, gradient)
        y[3, 5] = value
        return (y, *others)

    assert len(problems(broken, CPU)[1]) == 1


def test_rows_in_another_order_are_found():
    def swapped(x, weight, gradient):
        y, dx, dw = emulated()(x, weight, gradient)
        return y, dx, dw.flip(0)

    assert len(problems(swapped, CPU)[1]) == 1


def test_the_bound_is_that_of_the_formats():
    assert allowed(VALUES, VALUES) == pytest.approx(2**0.5 / 16)
    assert allowed(GRADIENTS, VALUES) == pytest.approx(5**0.5 / 16)
    x, weight, gradient = operands(CPU)
    assert x.dtype == weight.dtype == gradient.dtype == torch.bfloat16
    # Without their scales these are zero or too large for E4M3.
    assert x.abs().max() < 2**-9
    assert weight.abs().max() > 448


def test_torchs_own_fp8_gemm_passes(monkeypatch):
    for name, size in {"_TOKENS": 64, "_IN": 128, "_OUT": 96}.items():
        monkeypatch.setattr(fp8_check, name, size)  # torch's own on a CPU takes half a minute for what a GPU gets
    try:
        used, found = problems(scaled_gemms, CPU)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no FP8 GEMM on the CPU: {error}")
    assert found == []
    assert used < 0.6


def test_without_a_gpu_the_program_says_what_torch_sees():
    done = run("megatron_qwen.models.fp8_check", check=True)
    result = json.loads(done.stdout)
    assert result["state"] == "wrong"
    assert "finds no GPU" in result["found"]


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_a_gpu_without_fp8_is_not_tried(capability, monkeypatch):
    monkeypatch.setattr(fp8_check.device, "has_cuda", lambda: True)
    monkeypatch.setattr(fp8_check.device, "compute_capability", lambda: capability)
    result = dict(fp8_check.result())
    assert result["state"] == "not tried"
    assert "needs an Ada" in result["found"]


def in_bf16(x, weight, gradient):
    """No FP8 at all."""
    x, weight, gradient = x.float(), weight.float(), gradient.float()  # bf16 GEMMs are slow on some CPUs
    return (x @ weight.t()).bfloat16(), (gradient @ weight).bfloat16(), (gradient.t() @ x).bfloat16()


@pytest.mark.parametrize(("gemms", "state"), [(emulated(), "ok"), (in_bf16, "wrong")])
def test_the_result_of_a_gpu(gemms, state, monkeypatch):
    monkeypatch.setattr(fp8_check.device, "has_cuda", lambda: True)
    monkeypatch.setattr(fp8_check.device, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(fp8_check.device, "current", lambda: CPU)
    monkeypatch.setattr(fp8_check.device, "device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(fp8_check.te_backend, "is_installed", lambda: False)
    monkeypatch.setattr(fp8_check, "scaled_gemms", gemms)
    result = dict(fp8_check.result())
    assert result["state"] == state
    assert "without Transformer Engine on NVIDIA H100" in result["found"]
    assert ("fix" in result) == (state == "wrong")
