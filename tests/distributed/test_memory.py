"""The memory estimate against tensors counted on real ranks: dense and MoE, every layout.

Some layouts again on a second shape, which was not looked at while the estimate was written.
"""

import numpy as np
import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.estimate.memory import memory_per_stage
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import DENSE, MOE
from tests.tiers import cases

# Large beside what is too small to be counted; logits in small chunks, as on a CPU.
COMMON = [
    "model.num_layers=4",
    "model.max_position_embeddings=1024",
    "data.seq_length=512",
    "data.validation_fraction=0.0",
    "training.eval_iters=0",
    "performance.cross_entropy_chunk_tokens=128",
]
NARROW_SHAPE = [
    "model.hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=384",
    "model.vocab_size=1024",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
]
WIDE_SHAPE = [
    "model.hidden_size=192",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.kv_channels=32",
    "model.ffn_hidden_size=512",
    "model.vocab_size=2048",
    "training.micro_batch_size=3",
    "training.global_batch_size=6",
]
# The estimate assumes that each expert gets as many tokens.
EVEN = "model.moe_router_force_load_balancing=true"
EXPERTS = {
    "narrow": [EVEN, "model.moe_ffn_hidden_size=128", "model.moe_shared_expert_intermediate_size=256"],
    "wide": [EVEN, "model.moe_ffn_hidden_size=160", "model.moe_shared_expert_intermediate_size=320"],
}
SHAPES = {"narrow": NARROW_SHAPE, "wide": WIDE_SHAPE}
TABLES = {"tiny_dense": {"one": (1, {}), **DENSE}, "tiny_moe": {"one": (1, {}), **MOE}}
# In every run: what a layout splits or keeps, each once, and of the second shape one layout of each model.
QUICK = {
    "tiny_dense": ("one", "PP2 uneven", "CP2", "DP2", "TP2+SPxPP2", "selective recompute"),
    "tiny_moe": ("TP2+SP", "EP2xTP2 ETP1", "PP2xEP2", "full recompute"),
}
QUICK_WIDE = (("tiny_dense", "PP2xVPP2", "wide"), ("tiny_moe", "EP2", "wide"))
WIDE = [("tiny_dense", name, "wide") for name in ("one", "CP2", "TP2+SPxPP2")]
WIDE += [("tiny_moe", name, "wide") for name in ("one", "TP2+SP", "EP2xTP2 ETP1", "full recompute")]
CASES = cases(
    [*((recipe, name, "narrow") for recipe, names in QUICK.items() for name in names), *QUICK_WIDE],
    [
        *((recipe, name, "narrow") for recipe, table in TABLES.items() for name in table if name not in QUICK[recipe]),
        *WIDE,
    ],
)


@pytest.fixture(scope="module")
def random_tokens(tmp_path_factory):
    """Ids at random."""
    prefix = tmp_path_factory.mktemp("random") / "tokens"
    with TokenFileWriter(prefix, vocab_size=1000) as writer:
        generator = np.random.default_rng(0)
        for _ in range(64):
            writer.add(generator.integers(0, 1000, 4096).tolist())
    return prefix


@pytest.mark.parametrize(("recipe", "name", "shape"), CASES, ids=[" ".join(case) for case in CASES])
def test_estimate_is_within_five_percent(recipe, name, shape, random_tokens, pool):
    compare(recipe, name, shape, random_tokens, pool)


LORA = ["lora.rank=16", "checkpoint.load=unused"]
FEW = [*LORA, "lora.target_modules=[q_proj,v_proj]"]
WHOLE = [*FEW, "lora.modules_to_save=[lm_head]"]
LORA_CASES = cases(
    [("tiny_dense", "one", "narrow", LORA), ("tiny_moe", "EP2", "narrow", LORA), ("tiny_dense", "TP2+SP", "wide", FEW)],
    [
        *(("tiny_dense", name, "wide", LORA) for name in ("one", "TP2+SP", "PP2", "full recompute", "CP2")),
        ("tiny_dense", "one", "narrow", FEW),
        ("tiny_dense", "one", "narrow", WHOLE),
        ("tiny_moe", "one", "narrow", LORA),
        ("tiny_moe", "one", "wide", FEW),
        ("tiny_moe", "EP2", "wide", LORA),
    ],
)


@pytest.mark.parametrize(("recipe", "name", "shape", "lora"), LORA_CASES)
def test_estimate_of_lora_is_within_five_percent(recipe, name, shape, lora, random_tokens, pool):
    compare(recipe, name, shape, random_tokens, pool, lora)


def compare(recipe, name, shape, random_tokens, pool, more=()):
    ranks, layout = TABLES[recipe][name]
    words = [*COMMON, *SHAPES[shape], *(EXPERTS[shape] if recipe == "tiny_moe" else []), f"data.path={random_tokens}"]
    words += more
    config = jobs.with_layout(resolve(recipe, words, RECIPES), layout)
    stages = memory_per_stage(config, world_size=ranks, backend="torch", gpu=False)
    fullest = dict.fromkeys(range(len(stages)), 0.0)
    for rank, counted in enumerate(pool[ranks].run(jobs.peak_memory, config)):
        expected = stages[counted["stage"]]
        held = counted["held"]
        for part in ("weights", "gradients", "optimizer"):
            assert held[part] == pytest.approx(getattr(expected, part), rel=1e-2), part
        measured = sum(held.values()) + counted["step"]
        fullest[expected.stage] = max(fullest[expected.stage], measured)
        print(f"{recipe} {name} {shape}, rank {rank}: {measured / 2**20:.1f} MiB")
    for expected in stages:
        predicted = expected.state_gib * 2**30 + expected.activations + expected.loss
        print(f"stage {expected.stage}: {predicted / 2**20:.1f} MiB expected")
        assert predicted == pytest.approx(fullest[expected.stage], rel=0.05)
