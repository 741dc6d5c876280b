"""Messages of data parallelism that hide behind compute: every weight has arrived when it is used."""

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.tiers import cases

STEPS = 3
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Buckets of one matrix: what is used without waiting for its own bucket waits for none.
BUCKET = 3_000
CASES = {
    "dense, untied": ("tiny_dense", 2, []),
    "dense, tied": ("tiny_dense", 2, ["model.share_embeddings_and_output_weights=true"]),
    "dense, two stages": ("tiny_dense", 4, ["parallel.pipeline_model_parallel_size=2"]),
    "dense, two stages, tied": (
        "tiny_dense",
        4,
        ["parallel.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true"],
    ),
    "dense, recomputed": ("tiny_dense", 2, ["training.recompute_granularity=full"]),
    "mixture": ("tiny_moe", 2, []),
    "mixture, one by one": ("tiny_moe", 2, ["performance.moe_grouped_gemm=false"]),
    "mixture, experts over ranks": ("tiny_moe", 4, ["parallel.expert_model_parallel_size=2"]),
    "mixture, recomputed": ("tiny_moe", 2, ["training.recompute_granularity=full"]),
}
QUICK = ["dense, two stages, tied", "dense, recomputed", "mixture, one by one", "mixture, experts over ranks"]


@pytest.mark.parametrize("case", cases(QUICK, [case for case in CASES if case not in QUICK]))
def test_same_losses_as_without(case, pool, tokens):
    recipe, ranks, overrides = CASES[case]
    words = [f"data.path={tokens}", f"training.train_iters={STEPS}", *overrides]
    plain = pool[ranks].run(jobs.train, resolve(recipe, words, RECIPES), STEPS)
    config = resolve(recipe, [*words, *OVERLAP], RECIPES)
    overlapped = pool[ranks].run(jobs.train_in_buckets, config, STEPS, BUCKET)
    assert overlapped[0] == pytest.approx(plain[0]["losses"], rel=1e-6)
