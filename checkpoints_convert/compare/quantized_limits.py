"""What a quantized model may differ by: one table for its weights, one for its logits."""

from collections.abc import Iterable

from checkpoints_convert.compare.grid_error import GridError

# A weight on its own grid (``grid_error``), measured on random models of 3 layers and hidden size 256, with groups of
# 128 and 32 columns, rows and blocks. Rounding to nearest: ratio 0.99, bias 0, gain 0. GPTQ with inputs of a quarter of
# the rank: ratio 1.47 (2.0 in the worst row), bias 0.007, gain 0.04. Of what is wrong: zeros off by one have bias 0.96
# and more; scales of the next row or group gain 0.61 to 0.98; half the scales gain 0.37 to 0.64; a permuted g_idx ratio
# 2.9 to 7.9; another order of the codes ratio 10 and more.
_MOST_RATIO, _MOST_ROW_RATIO, _MOST_BIAS, _MOST_GAIN = 2.5, 5.0, 0.15, 0.2

# By precision: the relative error of a weight that is too large whatever its grid, and the mean KL divergence of the
# logits, in nats a position. Several times what rounding to nearest has: a random model of 3 layers (rms of logits
# 0.8) has 0.04 for int4, 1.5e-4 for int8 and 0.13 for Q2_K, and 0.65 for int4 with zeros off by one. One of 2 layers
# whose logits have an rms of 1.4 has 0.17 for int4 and 0.015 for FP8.
#                     relative error, KL divergence
_BY_PRECISION = {
    "int8": (0.10, 2e-3),
    "fp8": (0.10, 0.03),
    "Q8_0": (0.05, 2e-3),
    "Q6_K": (0.10, 5e-3),
    "Q5_K": (0.15, 0.02),
    "int4": (0.40, 0.30),
    "Q4_K": (0.30, 0.10),
    "Q4_0": (0.40, 0.30),
    "Q3_K": (0.40, 0.30),
    "Q2_K": (0.60, 0.60),
    # What rows take that are no multiple of 256.
    "Q5_1": (0.15, 0.02),
    "Q5_0": (0.15, 0.02),
    "Q4_1": (0.40, 0.30),
    # Casts. Small float16 values lose digits.
    "F32": (1e-6, 1e-6),
    "BF16": (2.0**-8, 2e-3),
    "F16": (2.0**-8, 2e-3),
}
_UNKNOWN = (0.60, 0.60)


def weight_fault(error: GridError, precision: str) -> str | None:
    """What is wrong with a quantized weight; None where it is within the limits. NaN is beyond all."""
    most = _of(precision)[0]
    told = f"its relative error is {error.relative:.3g} ({error.ratio:.3g} times that of rounding to nearest)"
    if not error.relative <= most:
        return f"is another weight: {told}; {precision} has at most {most:g}"
    if not abs(error.bias) <= _MOST_BIAS:
        return f"is shifted by {error.bias:+.2f} steps of its grid on average (zeros that are off?): {told}"
    if not error.gain <= _MOST_GAIN:
        return f"has scales that are not its own: factors would remove {error.gain:.0%} of its squared error; {told}"
    if not error.ratio <= _MOST_RATIO:
        return f"is not on its grid (order of codes or groups?): {told}"
    if not error.worst_row <= _MOST_ROW_RATIO:
        return f"has a row whose error is {error.worst_row:.3g} times that of rounding to nearest; {told}"
    return None


def largest_error(precision: str) -> float:
    """The relative error of a weight that passes."""
    return _of(precision)[0]


def largest_divergence(precisions: Iterable[str]) -> float:
    """The mean KL divergence that passes, in nats; the largest of several precisions."""
    return max(_of(precision)[1] for precision in precisions)


def _of(precision: str) -> tuple[float, float]:
    return _BY_PRECISION.get(precision, _UNKNOWN)
