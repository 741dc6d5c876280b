"""The optimizer's state as a checkpoint wants it: gathered in place, the same as megatron-core's own gather."""

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs

CASES = {
    "one rank": ("tiny_dense", 1, []),
    "DP2": ("tiny_dense", 2, []),
    "DP4 bf16": ("tiny_dense", 4, ["precision.dtype=bf16"]),
    "DP2xEP2": ("tiny_moe", 4, ["parallel.expert_model_parallel_size=2"]),
    "DP2, many buckets": ("tiny_dense", 2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_cores(case, pool, tokens):
    recipe, ranks, overrides = CASES[case]
    bucket_size = 20_000 if "buckets" in case else None
    config = resolve(recipe, [f"data.path={tokens}", *overrides], RECIPES)
    compared = [entry for rank in pool[ranks].run(jobs.gathered_states, config, bucket_size) for entry in rank]
    assert sum(size for size, _ in compared) > 3 * 50_000
    assert {gap for _, gap in compared} == {0.0}
