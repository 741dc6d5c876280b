"""The planner's layouts: each is legal and fits, each that is rejected has a reason, and nothing is left out."""

import time

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.layouts import layouts
from megatron_qwen.recipes.registry import RECIPES


def key(config):
    parallel, training = config.parallel, config.training
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_stages,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        training.micro_batch_size,
        training.recompute_granularity,
    )


@pytest.mark.parametrize(
    ("recipe", "gpus"), [("qwen2_5_72b", 1024), ("qwen2_57b_a14b", 256), ("qwen2_5_0_5b", 1), ("qwen3_30b_a3b", 64)]
)
def test_all_that_fit_are_legal_and_all_others_have_a_reason(recipe, gpus):
    device = hardware("h100")
    started = time.perf_counter()
    found, rejected = layouts(RECIPES[recipe](), world_size=gpus, device=device)
    print(f"{recipe} on {gpus}: {len(found)} fit, {len(rejected)} rejected, {time.perf_counter() - started:.2f} s")
    assert found
    for candidate in found:
        assert not problems(candidate.config, world_size=gpus)
        assert candidate.memory_gib <= device.memory_gib
        assert 0 < candidate.mfu < 0.75
    speeds = [candidate.tokens_per_second for candidate in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(len(one.reason) > 15 for one in rejected)
    seen = [key(candidate.config) for candidate in found] + [key(one.config) for one in rejected]
    assert len(seen) == len(set(seen))


def test_a_layout_that_people_run_is_among_them():
    """Qwen2.5-72B's own default layout, and TP 8 with PP 4 x 5."""
    recipe = RECIPES["qwen2_5_72b"]()
    found, rejected = layouts(recipe, world_size=1024, device=hardware("h100"))
    keys = {key(candidate.config)[:5] for candidate in found} | {key(one.config)[:5] for one in rejected}
    assert key(recipe)[:5] in keys
    assert (8, 4, 5, 1, 1) in keys


def test_more_memory_lets_more_layouts_fit():
    small, large = (
        {key(candidate.config) for candidate in layouts(RECIPES["qwen2_5_14b"](), world_size=8, device=device)[0]}
        for device in (hardware("h100"), hardware("h200"))
    )
    assert small < large


def test_devices_that_are_no_power_of_two():
    """14B on 24: TP 8 x PP 3, since 48 layers divide by 3."""
    found, _ = layouts(
        RECIPES["qwen2_5_14b"]().with_section("training", global_batch_size=96), world_size=24, device=hardware("h100")
    )
    assert (8, 3) in {key(candidate.config)[:2] for candidate in found}


def test_nothing_fits():
    found, rejected = layouts(RECIPES["qwen2_5_72b"](), world_size=2, device=hardware("h100"))
    assert not found
    assert any("GiB of 79" in one.reason for one in rejected)
