"""Shapes of a ladder against the family they are to resemble."""

from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.recipes.registry import RECIPES
from tools.scaling.ladder import _groups, _ratios, _sized, _widths, shape_near, shape_of

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


def test_counts_of_a_dense_shape():
    """Four layers of width 64 with 4 heads of 16 and 2 key/value heads, feed-forward 128, 320 tokens, untied."""
    layer = (64 * (64 + 2 * 32) + 64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    shape = shape_of(RECIPES["tiny_dense"]().model)
    assert shape.name == "l4_h64_f128"
    assert shape.params == shape.total == 4 * layer + 64
    assert shape.embedding == 2 * 320 * 64
    assert shape.granularity is None


def test_counts_of_a_mixture():
    """Of four experts of 64 a token visits two; the shared expert has 128 and a gate."""
    attention = (64 * (64 + 2 * 32) + 64 + 2 * 32) + 64 * 64
    layer = attention + 2 * 64 + 4 * 64 + 3 * 64 * 128 + 64
    shape = shape_of(RECIPES["tiny_moe"]().model)
    assert shape.name == "l4_h64_e4x64"
    assert shape.params == 4 * (layer + 2 * 3 * 64 * 64) + 64
    assert shape.total == 4 * (layer + 4 * 3 * 64 * 64) + 64
    assert shape.granularity == 2.0


SIZES = ["0_5b", "1_5b", "3b", "7b", "14b", "32b", "72b"]


@pytest.mark.parametrize("size", SIZES)
def test_the_ratios_are_those_of_the_released_models(size):
    model = RECIPES[f"qwen2_5_{size}"]().model
    aspect, ratio = _ratios(shape_of(model).params)
    assert aspect == pytest.approx(model.hidden_size / model.num_layers, rel=2e-3)
    assert ratio == pytest.approx(model.ffn_hidden_size / model.hidden_size, rel=2e-3)


@pytest.mark.parametrize(("smaller", "larger"), list(pairwise(SIZES)))
def test_between_two_models_the_ratios_are_their_geometric_means(smaller, larger):
    models = [RECIPES[f"qwen2_5_{size}"]().model for size in (smaller, larger)]
    counts = [shape_of(model).params for model in models]
    aspect, ratio = _ratios((counts[0] * counts[1]) ** 0.5)
    aspects = [model.hidden_size / model.num_layers for model in models]
    ratios = [model.ffn_hidden_size / model.hidden_size for model in models]
    assert aspect == pytest.approx((aspects[0] * aspects[1]) ** 0.5, rel=2e-3)
    assert ratio == pytest.approx((ratios[0] * ratios[1]) ** 0.5, rel=2e-3)


def test_ratios_beyond_the_family():
    """As far below the 0.5B model as 1.5B lies above it the width over depth falls by the same factor, but not to 8."""
    small, large = (shape_of(RECIPES[f"qwen2_5_{size}"]().model).params for size in ("0_5b", "1_5b"))
    assert _ratios(small * small / large) == pytest.approx(((896 / 24) ** 2 / (1536 / 28), 4864 / 896), rel=3e-3)
    assert _ratios(1e4) == pytest.approx((16.0, 4864 / 896), rel=2e-3)
    assert _ratios(1e12) == pytest.approx((8192 / 80, 29568 / 8192), rel=2e-3)


@pytest.mark.parametrize(
    ("layers", "aspect", "widths"),
    [
        (2, 16.0, [32, 48]),  # 20 to 51.2
        (15, 21.0, list(range(208, 505, 16))),  # 196.9 to 504: the widest below 512 has steps of 16
        (10, 32.0, list(range(256, 513, 64))),  # 200 to 512, which has steps of 64
        (10, 127.9, list(range(832, 2047, 64))),  # 799.4 to 2046.4
        (10, 128.0, [1024, 1536, 2048]),  # 800 to 2048, which has steps of 512
        (128, 128.0, list(range(10240, 16385, 512))),  # 10240 to 26214, of which 16384 are allowed
    ],
)
def test_widths_are_within_a_factor_of_1_6_of_the_ratio(layers, aspect, widths):
    assert _widths(layers, aspect) == widths


@pytest.mark.parametrize(
    ("hidden", "heads", "head"),
    [(16, 1, 16), (240, 15, 16), (256, 4, 64), (1472, 23, 64), (1536, 12, 128), (8192, 64, 128)],
)
def test_heads_of_a_width(hidden, heads, head):
    model = _sized(RECIPES["tiny_dense"]().model, 3, hidden, 4.0)
    assert (model.num_attention_heads, model.kv_channels, model.ffn_hidden_size) == (heads, head, 4 * hidden)


@pytest.mark.parametrize(
    ("heads", "heads_a_group", "groups"),
    [(14, 7, 2), (12, 6, 2), (28, 7, 4), (40, 5, 8), (64, 8, 8), (16, 1, 16), (15, 2, 1), (8, 3, 2), (4, 3, 1)],
)
def test_key_value_heads_are_a_power_of_two_near_the_family(heads, heads_a_group, groups):
    """Eight heads by three are two groups of four rather than four of two; four heads by three are one of four."""
    assert _groups(heads, heads_a_group) == groups


def test_an_expert_is_no_smaller_than_8():
    base = replace(RECIPES["tiny_moe"]().model, moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=64)
    model = _sized(base, 2, 16, 2.0)
    assert (model.moe_ffn_hidden_size, model.moe_shared_expert_intermediate_size) == (8, 16)


def test_a_shape_has_from_2_to_128_layers():
    base = RECIPES["tiny_dense"]()
    assert shape_near(base, 1e3).model.num_layers == 2
    largest = shape_near(base, 1e14).model
    assert (largest.num_layers, largest.hidden_size) == (128, 16384)
