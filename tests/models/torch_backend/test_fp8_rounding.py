"""FP8 rounding: what FP8 can hold stays as it is, errors are within half a step, scales fit the largest value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_qwen.models.torch_backend import fp8_rounding
from megatron_qwen.models.torch_backend.fp8_rounding import GRADIENTS, VALUES

# Half of the distance of neighbours, relative to the smaller one: 3 bits of mantissa, and 2.
HALF_STEP = {VALUES: 2**-4, GRADIENTS: 2**-3}
BLOCKS = [(1, 128), (128, 1), (128, 128)]


def finite(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of the format."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()]


def rounded(x: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None) -> torch.Tensor:
    if block is None:
        return fp8_rounding.tensorwise(x, dtype).dequantised()
    return fp8_rounding.blockwise(x, dtype, block=block).dequantised()


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
def test_what_the_format_holds_stays(dtype):
    every = finite(dtype)
    for power in (-20, 0, 7):
        x = (every * 2.0**power).view(1, -1)
        assert torch.equal(fp8_rounding.tensorwise(x, dtype).dequantised(), x)
        assert torch.equal(fp8_rounding.blockwise(x, dtype, block=(1, 256)).dequantised(), x)


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
@pytest.mark.parametrize("block", [None, *BLOCKS])
@given(rows=st.integers(1, 140), columns=st.integers(1, 300), power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_error_is_within_half_a_step(dtype, block, rows, columns, power, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    error = (rounded(x, dtype, block) - x).abs()
    # Below the smallest normal number the steps are even: half of one, for a scale at least half the largest.
    floor = torch.finfo(dtype).smallest_normal / torch.finfo(dtype).max * x.abs().max() * 2
    assert bool((error <= HALF_STEP[dtype] * torch.maximum(x.abs(), floor) * (1 + 1e-5)).all())


@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_the_largest_value_is_met(block):
    x = torch.zeros(200, 300)
    x[7, 5], x[150, 290] = 3.7e-5, -21.0
    result = fp8_rounding.tensorwise(x, VALUES) if block is None else fp8_rounding.blockwise(x, VALUES, block=block)
    assert float(result.dequantised()[150, 290]) == pytest.approx(-21.0, rel=HALF_STEP[VALUES])
    if block is None:
        assert float(result.inverse) == pytest.approx(21.0 / 448)
        return
    scales = result.inverse.reciprocal()
    assert torch.equal(scales, torch.exp2(scales.log2().round()))  # powers of two
    assert float(result.values.float().abs().max()) > 448 / 2
    # A small value far from the large one keeps its precision, which one scale a tensor cannot give it.
    assert float(result.dequantised()[7, 5]) == pytest.approx(3.7e-5, rel=HALF_STEP[VALUES])
    assert float(fp8_rounding.tensorwise(x, VALUES).dequantised()[7, 5]) == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("block", [None, (1, 128)])
def test_what_is_not_finite_is_not_hidden(bad, block):
    x = torch.randn(4, 256)
    x[2, 130] = bad
    result = rounded(x, VALUES, block)
    assert bool(result[2, 128:].isnan().all())
    assert block is None or bool(result[2, :128].isfinite().all())


@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_zeros_and_nothing(block):
    assert torch.equal(rounded(torch.zeros(5, 130), VALUES, block), torch.zeros(5, 130))
    assert rounded(torch.zeros(0, 130), VALUES, block).shape == (0, 130)
