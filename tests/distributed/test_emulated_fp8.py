"""Training with emulated FP8: stays near fp32, and leaves the outer layers alone."""

import statistics
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import DENSE, MOE
from tests.tiers import cases, count

STEPS = count(quick=20, thorough=200)
# Mean loss of the last twenty steps, relative to fp32. Seen after 200: -0.06 % to +0.09 %.
BOUND = 0.003
FEW = 5
PAIRS = cases(
    [("tiny_dense", "tensorwise"), ("tiny_moe", "blockwise")], [("tiny_dense", "blockwise"), ("tiny_moe", "tensorwise")]
)


def config_of(recipe: str, tokens: Any, **precision: Any) -> RunConfig:
    config = RECIPES[recipe]().with_section("data", path=str(tokens))
    config = config.with_section("optim", lr_decay_iters=STEPS).with_section("training", train_iters=STEPS)
    return config.with_section("precision", **precision)


def emulated(recipe: str) -> dict[str, Any]:
    return {"backend": "torch", "emulate_fp8": True, "fp8": recipe}


def end(answer: dict[str, Any]) -> float:
    return statistics.fmean(answer["losses"][-20:])


@pytest.fixture(scope="module")
def exact(pool, tokens):
    """fp32, by recipe."""
    return {name: pool[1].run(jobs.train, config_of(name, tokens), STEPS)[0] for name in ("tiny_dense", "tiny_moe")}


@pytest.mark.parametrize(("recipe", "fp8"), PAIRS)
def test_stays_near_fp32(recipe, fp8, pool, tokens, exact):
    answer = pool[1].run(jobs.train, config_of(recipe, tokens, **emulated(fp8)), STEPS)[0]
    gap = end(answer) / end(exact[recipe]) - 1
    print(f"{recipe} {fp8}: loss {end(answer):.4f}, fp32 {end(exact[recipe]):.4f}, gap {gap:+.2%}")
    assert answer["losses"] != exact[recipe]["losses"]
    assert abs(gap) < BOUND


def linear_layers(config: RunConfig) -> list[set[str]]:
    """Names of the classes of linear layers, by layer of the model."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from megatron_qwen.training.build import build_components

    linear = (ColumnParallelLinear, RowParallelLinear)
    layers = build_components(config).model.modules[0].decoder.layers
    return [{type(part).__name__ for part in layer.modules() if isinstance(part, linear)} for layer in layers]


PLAIN = {"TorchColumnParallelLinear", "TorchRowParallelLinear"}
FP8 = {"TensorwiseColumnParallelLinear", "TensorwiseRowParallelLinear"}


@pytest.fixture(scope="module")
def few_steps(pool, tokens):
    """Losses of a few steps of each model on one rank, in emulated FP8 and in fp32."""
    return {
        (name, is_fp8): pool[1].run(
            jobs.train, config_of(name, tokens, **(emulated("tensorwise") if is_fp8 else {})), FEW
        )[0]["losses"]
        for name in ("tiny_dense", "tiny_moe")
        for is_fp8 in (False, True)
    }


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe"])
@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        ({}, [PLAIN, FP8, FP8, PLAIN]),
        ({"num_layers_at_end_in_bf16": 2}, [PLAIN, FP8, PLAIN, PLAIN]),
        ({"num_layers_at_start_in_bf16": 0}, [FP8, FP8, FP8, PLAIN]),
        ({"first_last_layers_bf16": False}, [FP8, FP8, FP8, FP8]),
    ],
)
def test_outer_layers_are_left_alone(recipe, outer, expected, pool, tokens):
    config = config_of(recipe, tokens, **emulated("tensorwise"), **outer)
    assert pool[1].run(linear_layers, config)[0] == expected


def test_outer_layers_matter(pool, tokens):
    kept, taken = (
        pool[1].run(jobs.train, config_of("tiny_dense", tokens, **emulated("tensorwise"), **outer), 3)[0]["losses"]
        for outer in ({}, {"first_last_layers_bf16": False})
    )
    assert kept[0] != taken[0]


@pytest.mark.parametrize(
    ("recipe", "name"),
    cases(
        [("tiny_dense", "PP2xVPP2"), ("tiny_moe", "TP2+SP")],
        [("tiny_dense", name) for name in ("TP2", "TP2+SP", "PP2", "DP2")],
    ),
)
def test_layouts_agree(recipe, name, pool, tokens, few_steps):
    ranks, layout = (MOE if recipe == "tiny_moe" else DENSE)[name]
    config = config_of(recipe, tokens, **emulated("tensorwise"))
    alone, plain = few_steps[recipe, True], few_steps[recipe, False]
    spread = pool[ranks].run(jobs.train, jobs.with_layout(config, layout), FEW)[0]["losses"]
    gap = max(abs(a - b) / b for a, b in zip(spread, alone, strict=True))
    rounding = max(abs(a - b) / b for a, b in zip(plain, alone, strict=True))
    print(f"{recipe} {name}: {gap:.1e} between layouts, {rounding:.1e} between FP8 and fp32")
    # A sum in another order moves a value over a rounding edge now and then; FP8 itself costs more.
    assert gap < 2e-4
