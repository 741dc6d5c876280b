"""GEMMs of dense layers on a CPU equal torch's, whichever library computes them."""

import pytest
import torch

from megatron_qwen.models.torch_backend import compiled, dense_gemm
from megatron_qwen.models.torch_backend.compiled import Kernels
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

# [m, k] of weights: those whose gradients are copied and those whose inputs are; no multiples of a vector's length.
NARROW, WIDE = (70, 130), (130, 70)


@pytest.fixture
def large(monkeypatch):
    """Every GEMM counts as large, and as oneDNN's."""
    monkeypatch.setattr(dense_gemm, "_LEAST_ROWS", 1)
    monkeypatch.setattr(dense_gemm, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(dense_gemm, "_onednn_pays", lambda: True)


@pytest.fixture(params=["compiled", "as written", "plain"])
def way(request, monkeypatch):
    """With kernels, with their formulas, and without."""
    if request.param == "as written":
        monkeypatch.setattr(compiled.torch, "compile", lambda formula: formula)
    with PROCESS_KERNELS.using(None if request.param == "plain" else Kernels()):
        yield request.param


@pytest.fixture
def with_formulas(monkeypatch):
    """As if compiled."""
    monkeypatch.setattr(compiled.torch, "compile", lambda formula: formula)
    with PROCESS_KERNELS.using(Kernels()):
        yield


@pytest.fixture
def by_onednn(monkeypatch):
    """Shapes of the factors that oneDNN gets."""
    shapes, gemm = [], dense_gemm._onednn

    def seen(x, weight, bias=None):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        assert x.is_contiguous()
        return gemm(x, weight, bias)

    monkeypatch.setattr(dense_gemm, "_onednn", seen)
    return shapes


def drawn(rows: int, weight: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A sum of weight gradients, gradients of an output, and inputs."""
    torch.manual_seed(0)
    m, k = weight
    return [torch.randn(m, k, dtype=dtype), torch.randn(rows, m, dtype=dtype), torch.randn(rows, k, dtype=dtype)]


@pytest.mark.parametrize("weight", [NARROW, WIDE])
def test_weight_gradients(large, way, by_onednn, weight):
    counts = (33, 96, 1)
    for rows in (*counts, 0):
        total, gradient, x = drawn(rows, weight)
        expected = total.double() + gradient.double().t() @ x.double()
        where = total.data_ptr()
        assert dense_gemm.add_weight_gradient_(total, gradient, x).data_ptr() == where
        torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-4)
    first, second = min(weight), max(weight)
    assert by_onednn == ([] if way == "plain" else [((first, rows), (second, rows)) for rows in counts])


@pytest.mark.parametrize("weight", [NARROW, WIDE])
def test_a_factor_with_gaps(large, with_formulas, by_onednn, weight):
    """The second one would be very slow: it is torch's; the first is copied anyway."""
    total, gradient, x = drawn(64, weight)
    apart_x, apart = (torch.cat((one, one), dim=1)[:, : one.shape[1]] for one in (x, gradient))
    expected = total + gradient.t() @ x
    for factors, onednns in (
        ((apart, apart_x), 0),
        ((gradient, apart_x), weight is WIDE),
        ((apart, x), weight is NARROW),
    ):
        found = dense_gemm.add_weight_gradient_(total.clone(), *factors)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert len(by_onednn) == onednns
        by_onednn.clear()


def test_weight_gradients_in_bf16_are_torchs(large, way, by_onednn):
    total, gradient, x = drawn(64, WIDE, torch.bfloat16)
    expected = total.float() + gradient.float().t() @ x.float()
    dense_gemm.add_weight_gradient_(total, gradient, x)
    torch.testing.assert_close(total.float(), expected, rtol=2e-2, atol=0.2)
    assert not by_onednn


@pytest.mark.parametrize(("rows", "weight"), [(1023, (512, 512)), (1024, (512, 511))])
def test_small_weight_gradients_are_torchs(monkeypatch, way, by_onednn, rows, weight):
    monkeypatch.setattr(dense_gemm, "_onednn_pays", lambda: True)
    dense_gemm.add_weight_gradient_(*drawn(rows, weight))
    assert not by_onednn


def test_large_weight_gradients_are_onednns(monkeypatch, with_formulas, by_onednn):
    monkeypatch.setattr(dense_gemm, "_onednn_pays", lambda: True)
    total, gradient, x = drawn(1024, (512, 512))
    expected = total + gradient.t() @ x
    dense_gemm.add_weight_gradient_(total, gradient, x)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    assert by_onednn == [((512, 1024), (512, 1024))]


def test_a_weight_may_be_a_transposed_view():
    weight = torch.randn(32, 48)
    rows = torch.randn(7, 32)
    torch.testing.assert_close(dense_gemm.linear(rows, weight.t()), rows @ weight, rtol=1e-5, atol=1e-4)
