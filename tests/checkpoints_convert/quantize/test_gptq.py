"""GPTQ lowers the error of the output, on every grid and in every order."""

import itertools

import pytest
import torch

from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.quantize.gptq import GptqOptions, factorize, solve
from checkpoints_convert.quantize.quantized_rows import join_rows
from megatron_qwen.errors import ConversionError
from tests.checkpoints_convert.quantize.correlated import error_of, statistics_of, weight_and_inputs
from tests.tiers import THOROUGH

WEIGHT, INPUTS = weight_and_inputs()
HESSIAN = statistics_of(INPUTS).hessian()


def solved(grid: Grid, options: GptqOptions, *, weight=WEIGHT, hessian=HESSIAN) -> QuantizedLinear:
    factor = factorize(hessian.clone(), options, name="q_proj")
    assert factor is not None
    return solve(weight, factor, grid, options)


@pytest.mark.parametrize(("bits", "symmetric", "group"), itertools.product((4, 8), (True, False), (32, 128, None)))
def test_better_than_nearest(bits, symmetric, group):
    grid = Grid(bits, group, symmetric, torch.float16)
    nearest = error_of(grid.nearest(WEIGHT), WEIGHT, INPUTS)
    for act_order, static in itertools.product((False, True), repeat=2):
        found = solved(grid, GptqOptions(act_order=act_order, static_groups=static))
        assert error_of(found, WEIGHT, INPUTS) < nearest / 2, (act_order, static)
        assert found.codes.dtype == found.zeros.dtype == torch.uint8
        assert int(found.codes.max()) <= grid.largest_code
        assert torch.equal(found.scales, found.scales.half().float())
        if symmetric:
            assert (found.zeros == 1 << (bits - 1)).all()
        assert (found.group_of is not None) == (act_order and not static and group is not None)


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, damping: float) -> torch.Tensor:
    """Optimal Brain Quantization in the order of the columns: the inverse loses a column at every step."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + torch.eye(len(hessian)) * damping * hessian.diagonal().mean()
    group, found = grid.group or len(hessian), torch.zeros_like(weight)
    inverse = torch.linalg.inv(hessian)
    for at in range(len(hessian)):
        if at % group == 0:
            scale, zero = Grid(grid.bits, None, grid.symmetric, grid.scale_dtype).fit(weight[:, at : at + group])
        code = ((weight[:, at] / scale[:, 0]).round() + zero[:, 0]).clamp(0, grid.largest_code)
        found[:, at] = (code - zero[:, 0]) * scale[:, 0]
        error = (weight[:, at] - found[:, at]) / inverse[at, at]
        weight[:, at:] -= error[:, None] * inverse[at, at:]
        inverse = inverse - inverse[:, [at]] * inverse[[at], :] / inverse[at, at]
    return found.float()


def test_equals_the_definition_without_blocks():
    """Blocks, the Cholesky factor and parts of rows are ways to compute the same."""
    weight, inputs = weight_and_inputs(rows=12, columns=64)
    hessian = statistics_of(inputs).hessian()
    grid = Grid(4, 16, False, torch.float32)
    expected = by_definition(weight, hessian, grid, 0.01)
    # Blocks shorter than a group, no multiple of one, and longer than the row.
    for block in (8, 40, 128):
        options = GptqOptions(block=block)
        found = solved(grid, options, weight=weight, hessian=hessian).values()
        # A value between two codes may fall to either side, and then moves those behind it.
        assert float(((found - expected).abs() < 1e-5).float().mean()) > 0.99, block
    factor = factorize(hessian.clone(), GptqOptions(), name="q_proj")
    parts = [solve(part, factor, grid, GptqOptions()) for part in weight.split(5)]
    assert torch.allclose(join_rows(parts).values(), expected, atol=2e-2)


def test_act_order_rounds_the_largest_columns_first():
    options = GptqOptions(act_order=True)
    factor = factorize(HESSIAN.clone(), options, name="q_proj")
    order = factor.order.tolist()
    assert order == sorted(range(256), key=lambda column: -float(HESSIAN[column, column]))
    found = solved(Grid(4, 64, True, torch.float16), options)
    assert found.group_of.dtype == torch.int32
    assert [int(found.group_of[column]) for column in order] == [place // 64 for place in range(256)]
    # The column that comes first is the nearest on its own grid: nothing was made up for in it.
    first = order[0]
    scale = found.scales[:, int(found.group_of[first])]
    expected = ((WEIGHT[:, first] / scale).round() + 8).clamp(0, 15)
    assert torch.equal(found.codes[:, first].float(), expected)


def test_act_order_is_the_plain_order_of_permuted_columns():
    grid = Grid(4, 32, False, torch.float16)
    found = solved(grid, GptqOptions(act_order=True))
    order = HESSIAN.diagonal().argsort(descending=True, stable=True)
    plain = solved(grid, GptqOptions(), weight=WEIGHT[:, order], hessian=HESSIAN[order][:, order])
    assert torch.equal(found.values()[:, order], plain.values())


def test_dead_columns():
    inputs = INPUTS.clone()
    inputs[:, [3, 200]] = 0
    hessian = statistics_of(inputs).hessian()
    grid = Grid(4, 128, True, torch.float16)
    for act_order in (False, True):
        found = solved(grid, GptqOptions(act_order=act_order), hessian=hessian)
        assert not found.values()[:, [3, 200]].any()
        assert error_of(found, WEIGHT, inputs) < error_of(grid.nearest(WEIGHT), WEIGHT, inputs) / 2


def test_inputs_that_are_all_zero_have_no_factor():
    assert factorize(torch.zeros(8, 8), GptqOptions(), name="gate_proj") is None


def test_few_tokens_need_damping():
    """An expert may see fewer tokens than it has columns: the sum alone has no inverse."""
    hessian = statistics_of(INPUTS[:16]).hessian()
    factor = factorize(hessian.clone(), GptqOptions(), name="gate_proj")
    assert factor.inverse.isfinite().all()
    # Where rounding makes it negative beyond what was asked for, it takes more, and says so.
    negative = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(256)
    assert factorize(negative.clone(), GptqOptions(), name="gate_proj").damping == pytest.approx(0.1)
    with pytest.raises(ConversionError, match=r"gate_proj.*no Cholesky factor.*damping"):
        factorize(negative - 5 * hessian.diagonal().mean() * torch.eye(256), GptqOptions(), name="gate_proj")


@pytest.mark.parametrize("act_order", [False, True])
def test_padding_changes_nothing(act_order):
    """Columns of zeros with inputs of zero, as padding adds them, behind small inputs."""
    grid, options = Grid(4, 128, True, torch.float16), GptqOptions(act_order=act_order, static_groups=True)
    small = statistics_of(INPUTS * 1e-3).hessian()
    padded = torch.zeros(384, 384)
    padded[:256, :256] = small
    weight = torch.cat([WEIGHT, torch.zeros(len(WEIGHT), 128)], dim=1)
    found = solved(grid, options, weight=weight, hessian=padded)
    plain = solved(grid, options, hessian=small)
    error, of_nearest = (error_of(one, WEIGHT, INPUTS) for one in (found.values()[:, :256], grid.nearest(WEIGHT)))
    assert error == pytest.approx(error_of(plain, WEIGHT, INPUTS), rel=0.05)
    assert error < 0.7 * of_nearest
    assert not found.values()[:, 256:].any()


def test_inputs_that_are_not_finite():
    hessian = HESSIAN.clone()
    hessian[5, 5] = torch.nan
    with pytest.raises(ConversionError, match=r"up_proj.*not finite"):
        factorize(hessian, GptqOptions(), name="up_proj")


@pytest.mark.skipif(not THOROUGH, reason="thorough tier: gptqmodel takes minutes")
@pytest.mark.parametrize(
    ("symmetric", "act_order", "bits"),
    [(True, False, 4), (True, True, 4), (False, False, 4), (False, True, 4), (True, False, 8)],
)
def test_as_good_as_gptqmodel(symmetric, act_order, bits):
    """gptqmodel's own solver, given the same weight and the same inputs."""
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    linear = torch.nn.Linear(256, 96, bias=False)
    linear.weight.data = WEIGHT.clone()
    config = QuantizeConfig(
        bits=bits, group_size=128, sym=symmetric, desc_act=act_order, damp_percent=0.01, act_group_aware=False
    )
    solver = GPTQ(linear, config)
    solver.quantizer.configure(perchannel=True)
    for part in INPUTS.chunk(8):
        solver.add_batch(part[None], linear(part[None]))
    theirs = solver.quantize()[0]
    found = solved(Grid(bits, 128, symmetric, torch.float32), GptqOptions(act_order=act_order))
    assert error_of(found, WEIGHT, INPUTS) <= 1.02 * error_of(theirs.float(), WEIGHT, INPUTS)
    same = (found.values() - theirs).abs() < 1e-4
    assert float(same.float().mean()) > 0.99
