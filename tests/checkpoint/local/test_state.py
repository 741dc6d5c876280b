"""What a rank holds is all of it: under every kind of layout a resumed run is the run that was not stopped."""

import pytest

from tests.tiers import cases

VARIANTS = {
    "bf16, overlapped": (
        "tiny_dense",
        ["precision.dtype=bf16", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "PP2xVPP2": (
        "tiny_dense",
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    ),
    "bf16, TP2 and SP": (
        "tiny_dense",
        ["precision.dtype=bf16", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    "EP2": ("tiny_moe", ["parallel.expert_model_parallel_size=2"]),
}


@pytest.mark.parametrize("variant", cases(["bf16, overlapped"], ["PP2xVPP2", "bf16, TP2 and SP", "EP2"]))
def test_resumes_bit_equal_under_every_layout(variant, local_run):
    recipe, changes = VARIANTS[variant]
    whole = local_run(*changes, recipe=recipe, name="whole")
    whole.attempt("a", "b")
    stopped = local_run(*changes, recipe=recipe, name="stopped")
    stopped.attempt("a", "b", fail_after=5)
    answers = stopped.attempt("a", "b")
    text = "\n".join(answers[0]["log"])
    assert "resumed from a local checkpoint at iteration 4" in text, text
    assert stopped.hashes() == whole.hashes()
