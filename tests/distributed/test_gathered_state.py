"""The optimizer's state as a checkpoint wants it: every parameter whole and in its place, whatever the buckets."""

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs

CASES = {
    "one rank": ("tiny_dense", 1, []),
    "DP2": ("tiny_dense", 2, []),
    "DP4 bf16": ("tiny_dense", 4, ["precision.dtype=bf16"]),
    "DP3, many buckets": ("tiny_dense", 3, ["training.global_batch_size=6", "parallel.overlap_grad_reduce=true"]),
    "DP2xEP2": ("tiny_moe", 4, ["parallel.expert_model_parallel_size=2"]),
    "DP2, many buckets": ("tiny_dense", 2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_where_it_belongs(case, pool, tokens):
    recipe, ranks, overrides = CASES[case]
    bucket_size = 20_000 if "buckets" in case else None
    config = resolve(recipe, [f"data.path={tokens}", *overrides], RECIPES)
    compared = [entry for rank in pool[ranks].run(jobs.gathered_states, config, bucket_size) for entry in rank]
    kinds = [key for key, _, _ in compared]
    expert_groups = 2 if recipe == "tiny_moe" else 1  # ranks of another expert rank gather experts of their own
    assert set(kinds) == {"param", "exp_avg", "exp_avg_sq"}
    assert len({kinds.count(key) for key in set(kinds)}) == 1, "each kind is gathered as often"
    assert expert_groups <= kinds.count("param")
    assert all(parameters > 3 for _, parameters, _ in compared)
    assert {gap for _, _, gap in compared} == {0.0}
