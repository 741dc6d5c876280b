"""Rules that fields must fulfil together."""

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.recipes.registry import RECIPES


def test_rope_is_not_scaled_by_the_default_kind():
    config = RECIPES["tiny_dense"]()
    (problem,) = problems(config.with_section("rope", scaling=4.0))
    assert str(problem) == (
        "rope.scaling = 4.0: must be 1 with rope.kind=default, which does not extend the context; set rope.scaling=1."
    )
    (problem,) = problems(config.with_section("rope", scaling=0.5))
    assert (problem.where, problem.fix) == ("rope.scaling", "must be at least 1")
    (problem,) = problems(config.with_section("rope", base=1.0))
    assert (problem.where, problem.fix) == ("rope.base", "must be greater than 1")


@pytest.mark.parametrize(("length", "legal"), [(24, True), (28, False), (32, True)])
def test_a_context_parallel_rank_holds_two_chunks(length, legal):
    """On four ranks: 28 is a multiple of 4 and not of 8."""
    config = RECIPES["tiny_dense"]().with_section("parallel", context_parallel_size=4)
    found = problems(config.with_section("data", seq_length=length))
    assert [problem.where for problem in found] == ([] if legal else ["data.seq_length"])


@pytest.mark.parametrize(
    ("warmup", "decay", "legal"), [(40, 60, True), (40, 61, False), (90, None, True), (91, None, False)]
)
def test_warm_up_and_wsd_decay_fit_into_the_schedule(warmup, decay, legal):
    """40 iterations of warm-up and 60 of decay are 100; without a number the decay is a tenth."""
    schedule = {"lr_decay_style": "wsd", "lr_decay_iters": 100, "lr_warmup_iters": warmup, "lr_wsd_decay_iters": decay}
    found = problems(RECIPES["tiny_dense"]().with_section("optim", **schedule))
    assert [problem.where for problem in found] == ([] if legal else ["optim.lr_wsd_decay_iters"])
