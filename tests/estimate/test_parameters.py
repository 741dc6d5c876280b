"""Parameter counts and FLOPs equal the published figures, and what a built model holds."""

from dataclasses import fields
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.parameters import ParameterCount, count_parameters
from megatron_qwen.recipes.registry import RECIPES
from tests.estimate.by_hand import DENSE, EXPERTS, KV, LAYERS, MOE, SHARED, TOPK, VOCABULARY, WIDTH, F, H, Q, changed
from tests.tiers import thorough

PARTS = [field.name for field in fields(ParameterCount)]

# Qwen2.5 Technical Report and released configurations: total, without embeddings, training GFLOP per token at 4096.
PUBLISHED_DENSE = {
    "qwen2_5_0_5b": (494_032_768, 357_898_112, 4.02),
    "qwen2_5_1_5b": (1_543_714_304, 1_310_340_608, 11.38),
    "qwen2_5_3b": (3_085_938_688, 2_774_773_760, 22.14),
    "qwen2_5_7b": (7_615_616_512, 6_525_621_760, 47.36),
    "qwen2_5_14b": (14_770_033_664, 13_212_898_304, 96.03),
    "qwen2_5_32b": (32_763_876_352, 31_206_740_992, 208.02),
    "qwen2_5_72b": (72_706_203_648, 70_214_787_072, 460.98),
}
# Released configurations, in billions as published: total, active.
PUBLISHED_MOE = {"qwen1_5_moe_a2_7b": (14.316, 2.69), "qwen2_57b_a14b": (57.41, 14.25)}


@pytest.mark.parametrize("name", PUBLISHED_DENSE)
def test_dense_sizes_to_the_last_digit(name):
    total, without_embeddings, gflop = PUBLISHED_DENSE[name]
    model = RECIPES[name]().model
    count = count_parameters(model)
    assert (count.total, count.without_embeddings) == (total, without_embeddings)
    assert count.active == count.total
    assert round(training_flops_per_token(model, 4096) / 1e9, 2) == gflop


@pytest.mark.parametrize("name", PUBLISHED_MOE)
def test_moe_relatives(name):
    count = count_parameters(RECIPES[name]().model)
    total, active = PUBLISHED_MOE[name]
    assert round(count.total / 1e9, 3 if name.startswith("qwen1") else 2) == total
    assert round(count.active / 1e9, 2) == active


# Per layer of the small models of by_hand.py.
PROJECTIONS, BIAS = H * (Q + 2 * KV) + Q * H, Q + 2 * KV
BY_HAND = {
    "dense": (
        DENSE,
        {},
        {
            "embedding": VOCABULARY * H,
            "output": VOCABULARY * H,
            "attention": LAYERS * (PROJECTIONS + BIAS),
            "dense_mlp": LAYERS * 3 * H * F,
            "norms": LAYERS * 2 * H + H,
        },
    ),
    "tied, without bias, with normalised heads of 8 channels": (
        DENSE,
        {"share_embeddings_and_output_weights": True, "add_qkv_bias": False, "qk_layernorm": True},
        {
            "embedding": VOCABULARY * H,
            "attention": LAYERS * PROJECTIONS,
            "dense_mlp": LAYERS * 3 * H * F,
            "norms": LAYERS * (2 * H + 8 + 8) + H,
        },
    ),
    "MoE": (
        MOE,
        {},
        {
            "embedding": VOCABULARY * H,
            "output": VOCABULARY * H,
            "attention": LAYERS * (PROJECTIONS + BIAS),
            "router": LAYERS * H * EXPERTS,
            "routed_experts": LAYERS * EXPERTS * 3 * H * WIDTH,
            "active_experts": LAYERS * TOPK * 3 * H * WIDTH,
            "shared_expert": LAYERS * (3 * H * SHARED + H),
            "norms": LAYERS * 2 * H + H,
        },
    ),
}
BY_HAND["MoE without a shared expert"] = (
    MOE,
    {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False},
    {name: count for name, count in BY_HAND["MoE"][2].items() if name != "shared_expert"},
)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_part_by_hand(name):
    """Parts that are not named are empty."""
    config, words, parts = BY_HAND[name]
    assert count_parameters(changed(config, model=words).model) == ParameterCount(**(dict.fromkeys(PARTS, 0) | parts))


def test_without_experts_their_other_fields_count_nothing():
    assert count_parameters(changed(MOE, model={"num_moe_experts": None}).model) == count_parameters(DENSE.model)


def test_sums_of_parts():
    count = ParameterCount(*(2**power for power in range(9)))  # the sixth is of routed experts, the seventh of active
    assert count.total == 2**9 - 1 - count.active_experts
    assert count.active == 2**9 - 1 - count.routed_experts
    assert count.without_embeddings == count.total - 1 - 2


def stored_parameters(config: RunConfig) -> int:
    """Parameters of a built model, without the padding of its vocabulary."""
    import torch

    from megatron_qwen.distributed import groups as process_groups
    from megatron_qwen.models.backend import choose
    from megatron_qwen.models.build import build_model

    groups = process_groups.create(config.parallel, seed=1)
    (module,) = build_model(config, groups, choose(config.precision), device=torch.device("cpu")).modules
    padding = module.vocab_size - config.model.vocab_size
    padded = [name for name, _ in module.named_parameters() if "word_embeddings" in name or "output_layer" in name]
    total = sum(parameter.numel() for parameter in module.parameters())
    return total - len(padded) * padding * config.model.hidden_size


def shrunk(name: str, tokens: Any) -> RunConfig:
    """A recipe with few layers and a short vocabulary, else as it is."""
    config = RECIPES[name]()
    config = config.with_section("data", path=str(tokens), seq_length=64)
    config = RunConfig(**{**vars(config), "parallel": RECIPES["tiny_dense"]().parallel})
    changes: dict[str, Any] = {
        "num_layers": 1,
        "vocab_size": 320,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "kv_channels": 16,
    }
    if config.model.is_moe:
        changes |= {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 64}
    return config.with_section("model", **changes)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_what_the_built_model_holds(name, pool, tokens):
    config = RECIPES[name]()
    if count_parameters(config.model).total > 10_000_000:
        config = shrunk(name, tokens)
    config = RunConfig(**{**vars(config), "parallel": RECIPES["tiny_dense"]().parallel})
    config = config.with_section("data", path=str(tokens))
    assert pool[1].run(stored_parameters, config)[0] == count_parameters(config.model).total


@thorough("small models are built in every run, and all released sizes are counted")
def test_0_5b_as_built(pool, tokens):
    """The smallest released size, whole."""
    config = RECIPES["qwen2_5_0_5b"]().with_section("data", path=str(tokens))
    assert pool[1].run(stored_parameters, config)[0] == PUBLISHED_DENSE["qwen2_5_0_5b"][0]
