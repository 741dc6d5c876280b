"""Shapes of a ladder against the family they are to resemble."""

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.recipes.registry import RECIPES
from tools.scaling.ladder import shape_near

EXACT = ["qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "qwen2_57b_a14b"]


@pytest.mark.parametrize("name", EXACT)
def test_the_family_is_found_again(name):
    """Asked for the parameters of a released model the ladder answers with its very shape."""
    base = RECIPES[name]()
    count = count_parameters(base.model)
    shape = shape_near(base, count.active - count.embedding - count.output)
    for field in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
    ):
        assert getattr(shape.model, field) == getattr(base.model, field), field


@pytest.mark.parametrize("name", ["qwen2_5_0_5b", "qwen2_57b_a14b", "qwen3_30b_a3b", "tiny_dense", "tiny_moe"])
@pytest.mark.parametrize("params", [1e5, 1e6, 44e6, 5e8, 3e9, 5e10])
def test_any_size_is_near_and_legal(name, params):
    base = RECIPES[name]()
    shape = shape_near(base, params)
    assert shape.params == pytest.approx(params, rel=0.2 if params < 1e6 else 0.07)
    parallel = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    parallel |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None, "sequence_parallel": False}
    config = base.with_section("model", **vars(shape.model)).with_section(
        "parallel",
        **parallel,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
    )
    assert not list(problems(config, world_size=1))
    assert shape.model.vocab_size == base.model.vocab_size
    assert (shape.granularity is not None) == base.model.is_moe
