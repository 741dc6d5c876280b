"""Rules that fields must fulfil together."""

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
