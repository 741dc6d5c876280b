"""The three GEMMs of an FP8 layer are near the exact ones, and no scale may be wrong."""

from dataclasses import replace
from typing import Any

import pytest

# E4M3 is off by at most 1/16 a value, E5M2 by 1/8; over a sum most of it averages out.
BOUND = {"output": 0.04, "grad_x": 0.06, "grad_weight": 0.06}


def errors(recipe: str, wrong: str | None) -> dict[str, float]:
    """Relative errors of the GEMMs, with the scale of one operand doubled behind its back."""
    import torch
    import torch.distributed as dist

    from megatron_qwen.models.torch_backend import fp8_linear

    plain_both, plain_weight = fp8_linear._both_ways, fp8_linear._weight

    def spoil(scaled: Any) -> Any:
        return replace(scaled, inverse=scaled.inverse * 2)

    def both(x: Any, dtype: Any, *rest: Any) -> Any:
        by_token, by_feature = plain_both(x, dtype, *rest)
        kind = "gradient" if dtype == fp8_linear.GRADIENTS else "input"
        return (
            spoil(by_token) if wrong == f"{kind} by token" else by_token,
            spoil(by_feature) if wrong == f"{kind} by feature" else by_feature,
        )

    def weight_of(*arguments: Any) -> Any:
        return spoil(plain_weight(*arguments)) if wrong == "weight" else plain_weight(*arguments)

    torch.manual_seed(0)
    x, weight = torch.randn(300, 200, requires_grad=True), torch.randn(260, 200, requires_grad=True)
    gradient = torch.randn(300, 260) * 1e-4
    exact_output = x @ weight.t()
    exact = torch.autograd.grad(exact_output, (x, weight), gradient)
    fp8_linear._both_ways, fp8_linear._weight = both, weight_of
    try:
        output = fp8_linear._Fp8Gemm.apply(x, weight, recipe, dist.group.WORLD)
        found = torch.autograd.grad(output, (x, weight), gradient)
    finally:
        fp8_linear._both_ways, fp8_linear._weight = plain_both, plain_weight
    pairs = {"output": (output, exact_output), "grad_x": (found[0], exact[0]), "grad_weight": (found[1], exact[1])}
    return {
        name: float((ours - theirs).detach().norm() / theirs.detach().norm()) for name, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_products_are_near_the_exact_ones(recipe, pool):
    (found,) = pool[1].run(errors, recipe, None)
    print(recipe, {name: f"{error:.3f}" for name, error in found.items()})
    assert all(0 < error < BOUND[name] for name, error in found.items())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize(
    ("wrong", "seen_in"),
    [
        ("input by token", {"output"}),
        ("input by feature", {"grad_weight"}),
        ("weight", {"output", "grad_x"}),
        ("gradient by token", {"grad_x"}),
        ("gradient by feature", {"grad_weight"}),
    ],
)
def test_a_wrong_scale_is_seen(recipe, wrong, seen_in, pool):
    (found,) = pool[1].run(errors, recipe, wrong)
    assert {name for name, error in found.items() if error > BOUND[name]} == seen_in
