"""Recipes of released models against the figures of their config.json, written down by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_qwen.config.blend import read_blend, stage_configs
from megatron_qwen.config.checks import problems
from megatron_qwen.estimate.choices import choose
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.layouts import layouts
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.estimate.memory import memory_per_stage
from megatron_qwen.recipes.registry import RECIPES

# Layers, hidden, query heads, KV heads, channels of a head, FFN, tied embeddings, rows, positions, norm epsilon.
DENSE = {
    "qwen2_5_0_5b": (24, 896, 14, 2, 64, 4864, True, 151936, 32768, 1e-6),
    "qwen2_5_1_5b": (28, 1536, 12, 2, 128, 8960, True, 151936, 131072, 1e-6),
    "qwen2_5_3b": (36, 2048, 16, 2, 128, 11008, True, 151936, 32768, 1e-6),
    "qwen2_5_7b": (28, 3584, 28, 4, 128, 18944, False, 152064, 131072, 1e-6),
    "qwen2_5_14b": (48, 5120, 40, 8, 128, 13824, False, 152064, 131072, 1e-5),
    "qwen2_5_32b": (64, 5120, 40, 8, 128, 27648, False, 152064, 131072, 1e-5),
    "qwen2_5_72b": (80, 8192, 64, 8, 128, 29568, False, 152064, 131072, 1e-5),
}
# Layers, hidden, query heads, KV heads, channels of a head, experts, top-k, FFN of an expert, of the shared expert, its
# gate, softmax over all experts (norm_topk_prob false), QK norm, bias of QKV.
MOE = {
    "qwen1_5_moe_a2_7b": (24, 2048, 16, 16, 128, 60, 4, 1408, 5632, True, True, False, True),
    "qwen2_57b_a14b": (28, 3584, 28, 4, 128, 64, 8, 2560, 20480, True, True, False, True),
    "qwen3_30b_a3b": (48, 2048, 32, 4, 128, 128, 8, 768, None, False, False, True, False),
    "qwen3_235b_a22b": (94, 4096, 64, 4, 128, 128, 8, 1536, None, False, False, True, False),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    config = RECIPES[name]()
    model = config.model
    assert DENSE[name] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        model.ffn_hidden_size,
        model.share_embeddings_and_output_weights,
        model.vocab_size,
        model.max_position_embeddings,
        model.layernorm_epsilon,
    )
    assert (model.add_qkv_bias, model.qk_layernorm, model.num_moe_experts) == (True, False, None)
    assert model.init_method_std == 0.02


@pytest.mark.parametrize("name", [name for name in RECIPES if "_instruct" in name])
def test_fine_tuning_has_the_numbers_of_the_report(name):
    """arXiv 2412.15115, section 4.1; the model is that of the base but for its positions."""
    config = RECIPES[name]()
    optim, base = config.optim, RECIPES[name.split("_instruct")[0]]()
    assert config.recipe == name
    assert config.objective.kind == "sft"
    assert (optim.learning_rate, optim.min_learning_rate, optim.weight_decay, optim.clip_grad) == (7e-6, 7e-7, 0.1, 1.0)
    expected = {"qwen1_5_moe_a2_7b_instruct": 8192, "qwen2_5_turbo_standin_instruct_long": 262_144}
    assert config.data.seq_length == expected.get(name, 4096 if "_math_" in name else 32_768)
    assert config.data.seq_length * config.training.global_batch_size == 2**21
    assert config.model == replace(base.model, max_position_embeddings=config.model.max_position_embeddings)
    assert config.parallel.context_parallel_size == 1


def test_continued_pretraining_reads_the_published_tokens():
    """arXiv 2409.12186: 5.2T tokens of files and 300B of repositories; arXiv 2409.12122: 1T, at 4,096."""
    for name in [name for name in RECIPES if "_coder_" in name or "_math_" in name]:
        config = RECIPES[name]()
        assert config.recipe == name
        if name.endswith("_instruct"):
            continue
        length, tokens = (8192, 5.5e12) if "_coder_" in name else (4096, 1e12)
        step = config.data.seq_length * config.training.global_batch_size
        assert config.data.seq_length == length
        assert config.training.train_iters * step == pytest.approx(tokens, rel=1e-5)
        base = RECIPES[name.replace("_coder", "").replace("_math", "")]()
        assert step == base.data.seq_length * base.training.global_batch_size
        assert config.model == replace(base.model, max_position_embeddings=config.model.max_position_embeddings)


def test_the_mixture_of_code_in_the_docs(tmp_path):
    """The blend of docs/fine_tuning.md with a recipe: both stages, their lengths and tokens, and the shares."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "fine_tuning.md").read_text()
    (block,) = [part.split("```")[0] for part in text.split("```yaml\n")[1:] if "fim_rate" in part.split("```")[0]]
    (tmp_path / "code.yaml").write_text(block)
    config = RECIPES["qwen2_5_coder_7b"]().with_section("data", blend=str(tmp_path / "code.yaml"))
    assert not problems(config)
    blend = read_blend(tmp_path / "code.yaml")
    assert [stage.tokens for stage in blend.stages] == [5_200_000_000_000, None]
    assert blend.sources["code"].fim_spm_rate == 0.0 < blend.sources["code"].fim_rate
    files, repositories = stage_configs(config)
    assert (files.data.seq_length, repositories.data.seq_length) == (8192, 32_768)
    assert (files.rope.base, repositories.rope.base) == (10_000, 1_000_000)
    assert files.training.global_batch_size * 8192 == repositories.training.global_batch_size * 32_768
    assert blend.stages[0].weights == {"code": 0.7, "text": 0.2, "math": 0.1}


@pytest.mark.parametrize("name", MOE)
def test_mixtures_of_experts(name):
    model = RECIPES[name]().model
    assert MOE[name] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        model.num_moe_experts,
        model.moe_router_topk,
        model.moe_ffn_hidden_size,
        model.moe_shared_expert_intermediate_size,
        model.moe_shared_expert_gate,
        model.moe_router_pre_softmax,
        model.qk_layernorm,
        model.add_qkv_bias,
    )
    assert model.moe_aux_loss_coeff == 0.001


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("_instruct", "_instruct_long"))])
def test_fine_tuning_fits_as_it_is_laid_out(name):
    """In the 80 GiB of an H100, recompute as it is chosen at the start."""
    config = RECIPES[name]()
    parallel = config.parallel
    size = parallel.model_parallel_size * max(1, parallel.expert_model_parallel_size) * 2
    machine = Machine("te", gpu=True, memory_gib=hardware("h100").memory_gib)
    chosen, _ = choose(config, machine, world_size=size)
    assert max(stage.total_gib for stage in memory_per_stage(chosen, world_size=size)) < machine.memory_gib


def test_the_planner_offers_no_context_parallelism_for_packed_rows():
    """The te backend refuses it at the start."""
    config = RECIPES["qwen2_5_3b_instruct"]()
    found, rejected = layouts(config, world_size=8, device=hardware("h100"))
    assert found
    assert all(one.config.parallel.context_parallel_size == 1 for one in found)
    reasons = [one.reason for one in rejected if one.config.parallel.context_parallel_size > 1]
    assert reasons
    assert all("packed rows" in reason for reason in reasons)
    with_torch = config.with_section("precision", backend="torch")
    found, _ = layouts(with_torch, world_size=8, device=hardware("h100"))
    assert any(one.config.parallel.context_parallel_size > 1 for one in found)
