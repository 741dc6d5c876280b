"""The estimate's exact parts against real ranks and a real checkpoint, its peaks against those of an H200."""

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.estimate.memory import (
    ALLOWANCE_GIB,
    StageMemory,
    checkpoint_bytes,
    memory_per_stage,
    parameters_per_rank,
)
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.estimate.speed import expected_speed
from megatron_qwen.recipes.registry import RECIPES
from tests.estimate.by_hand import (
    DENSE,
    EXPERTS,
    KV,
    LAYERS,
    MOE,
    PADDED,
    SHARED,
    TOKENS,
    WIDTH,
    F,
    H,
    Q,
    changed,
    tensor_parallel,
)

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]


def parameters_here(config: RunConfig) -> tuple[int, int]:
    """Pipeline stage and scalars of this rank's part of the model."""
    from megatron_qwen.training.build import build_components

    components = build_components(config)
    count = sum(parameter.numel() for module in components.model.modules for parameter in module.parameters())
    return components.groups.pp.rank(), count


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("tiny_dense", []),
        ("tiny_dense", TP2),
        ("tiny_dense", PP2),
        ("tiny_dense", [*PP2, "model.share_embeddings_and_output_weights=true"]),
        ("tiny_moe", []),
        ("tiny_moe", ["parallel.expert_model_parallel_size=2"]),
        ("tiny_moe", TP2),
        ("tiny_dense", ["model.qk_layernorm=true", "model.add_qkv_bias=false", *PP2]),
    ],
)
def test_parameters_of_a_rank(pool, tokens, recipe, words):
    config = resolve(recipe, [f"data.path={tokens}", *words], RECIPES)
    for stage, count in pool[2].run(parameters_here, config):
        assert sum(parameters_per_rank(config, stage=stage)) == count


def test_bytes_of_a_checkpoint(finished_run):
    config = resolve(str(finished_run / "run.yaml"), [], RECIPES)
    checkpoint = committed(finished_run / "checkpoints")[0][1]
    real = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    predicted = checkpoint_bytes(config, parameters=count_parameters(config.model).total)
    # Padding of the vocabulary and the archives around the tensors come on top; little models have much of both.
    assert 0.75 < predicted / real <= 1.02


def test_the_7b_by_hand():
    """28 layers under TP 2 on 16 ranks: weights 2 B and gradients 4 B a parameter, the optimizer's 12 B over DP 8."""
    config = RECIPES["qwen2_5_7b"]()
    (stage,) = memory_per_stage(config, world_size=16)
    half = count_parameters(config.model).total / 2
    assert stage.parameters == pytest.approx(half, rel=1e-3)
    assert stage.weights + stage.gradients == 6 * stage.parameters
    assert stage.optimizer == pytest.approx(12 * stage.parameters / 8)


def test_optimizer_state_is_shared_by_context_parallel_ranks_as_well():
    """The 7B on 16 ranks as TP 2 x CP 4 x DP 2: the eight ranks that hold the same weights share 12 B a parameter."""
    config = RECIPES["qwen2_5_7b"]().with_section("parallel", context_parallel_size=4)
    (stage,) = memory_per_stage(config, world_size=16)
    assert stage.optimizer == pytest.approx(12 * stage.parameters / 8)


def test_recompute_pipeline_and_context_need_less():
    config = RECIPES["qwen2_5_72b"]()

    def activations(**changes):
        section = changes.pop("section", "training")
        return max(
            stage.activations for stage in memory_per_stage(config.with_section(section, **changes), world_size=1024)
        )

    plain = activations()
    assert activations(recompute_granularity="full") < 0.2 * plain
    assert activations(micro_batch_size=2) == pytest.approx(2 * plain)
    assert activations(section="parallel", context_parallel_size=2) == pytest.approx(plain / 2)


def test_speed():
    config = RECIPES["qwen2_5_7b"]()
    one, two = (expected_speed(config, gpu="NVIDIA H100 80GB HBM3", world_size=size) for size in (16, 32))
    assert 1.8 < two.tokens_per_second / one.tokens_per_second <= 2
    assert one.bubble == 0
    assert one.tokens_per_second * one.step_s == pytest.approx(
        config.training.global_batch_size * config.data.seq_length
    )
    for gpu in ("unknown", "NVIDIA H100 PCIe"):
        assert expected_speed(config, gpu=gpu, world_size=16) is None
    assert expected_speed(config.with_section("precision", dtype="fp32"), gpu="H100", world_size=16) is None
    slower = expected_speed(config.with_section("training", recompute_granularity="full"), gpu="H100", world_size=16)
    assert slower.tokens_per_second < 0.85 * one.tokens_per_second
    assert one.hours(config) == pytest.approx(config.training.train_iters * one.step_s / 3600)


LEAN = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("recipe", "micro", "batch", "precision", "peak_gib"),
    [
        ("qwen2_5_7b", 2, 32, LEAN, 124.8),
        ("qwen2_5_7b", 1, 8, LEAN, 105.0),
        ("qwen2_5_7b", 1, 8, {**LEAN, "fp8": "tensorwise"}, 113.7),
        ("qwen2_5_7b", 2, 32, {**LEAN, "fp8": "tensorwise"}, 130.9),
        ("qwen2_5_1_5b", 2, 16, {}, 44.9),
        ("qwen2_5_0_5b", 4, 16, {}, 26.1),
        ("qwen2_5_0_5b", 4, 16, {"fp8": "tensorwise"}, 24.5),
    ],
)
def test_peaks_measured_on_one_h200(recipe, micro, batch, precision, peak_gib):
    """Allocator peaks of benchmarks/results/h200_gpu_step.json; the allowance is for what it does not see."""
    alone = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 1}
    config = RECIPES[recipe]().with_section("parallel", **alone).with_section("precision", **precision)
    config = config.with_section("training", micro_batch_size=micro, global_batch_size=batch)
    (stage,) = memory_per_stage(config, world_size=1)
    predicted = stage.total_gib - ALLOWANCE_GIB
    print(f"{recipe} {micro} / {batch}: {predicted:.1f} GiB, measured {peak_gib}")
    assert predicted == pytest.approx(peak_gib, rel=0.05)


def test_the_peak_of_a_mixture_measured_on_one_h200():
    """Four layers of Qwen3-30B-A3B, all 128 experts on one device; the same file."""
    config = RECIPES["qwen3_30b_a3b"]().with_section("model", num_layers=4).with_section("data", seq_length=4096)
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    config = config.with_section("parallel", pipeline_model_parallel_size=1, expert_model_parallel_size=1)
    config = config.with_section("training", micro_batch_size=2, global_batch_size=16)
    (stage,) = memory_per_stage(config, world_size=1)
    assert stage.total_gib - ALLOWANCE_GIB == pytest.approx(59.6, rel=0.05)


def test_what_is_not_on_the_device_takes_no_memory_there():
    config = RECIPES["qwen2_5_0_5b"]()
    (whole,) = memory_per_stage(config, world_size=1)
    (half,) = memory_per_stage(config.with_section("performance", optimizer_offload_fraction=0.5), world_size=1)
    assert half.optimizer == whole.optimizer / 2
    fp8 = config.with_section("precision", fp8="tensorwise", first_last_layers_bf16=False)
    (beside,) = memory_per_stage(fp8, world_size=1)
    (alone,) = memory_per_stage(fp8.with_section("performance", fp8_param_gather=True), world_size=1)
    assert alone.weights == whole.weights < beside.weights


# tiny_dense with a vocabulary padded from 320 to 384 rows (multiples of 128), under TP 2 to 512 (of 256). A layer has
# attention 2 x 64 x 64 + 2 x 64 x 32, its bias 128, SwiGLU 3 x 64 x 128, and norms 128; the last norm has 64.
MATRICES, BIAS, NORMS = 12_288 + 24_576, 128, 128
LAYER = MATRICES + BIAS + NORMS
BY_HAND = {
    "one rank": ("tiny_dense", [], 1, [2 * 384 * 64 + 4 * LAYER + 64]),
    "TP2": ("tiny_dense", TP2, 2, [2 * 256 * 64 + 4 * ((MATRICES + BIAS) // 2 + NORMS) + 64]),
    "PP2": ("tiny_dense", PP2, 2, [384 * 64 + 2 * LAYER, 384 * 64 + 2 * LAYER + 64]),
    # Attention as above, a router of 4 x 64, four experts of 3 x 64 x 64, a shared one of 3 x 64 x 128, its gate 64.
    "MoE": ("tiny_moe", [], 1, [2 * 384 * 64 + 4 * (12_288 + BIAS + NORMS + 256 + 4 * 12_288 + 24_576 + 64) + 64]),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(("dtype", "weight", "state"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_bytes_of_a_tiny_rank_by_hand(name, dtype, weight, state):
    """fp32 weights are their own main weights, so the optimizer has two moments; in bf16 it has main weights as well.

    Gradients are in fp32 either way.
    """
    recipe, words, ranks, scalars = BY_HAND[name]
    config = resolve(recipe, [*words, f"precision.dtype={dtype}"], RECIPES)
    stages = memory_per_stage(config, world_size=ranks, backend="torch", gpu=False)
    assert [stage.parameters for stage in stages] == scalars
    assert [stage.weights for stage in stages] == [weight * count for count in scalars]
    assert [stage.gradients for stage in stages] == [4 * count for count in scalars]
    assert [stage.optimizer for stage in stages] == [state * count for count in scalars]
    for stage in stages:
        assert stage.state_gib == pytest.approx((weight + 4 + state) * stage.parameters / 1024**3)


# Scalars of a layer of the small models of by_hand.py: matrices of attention, its bias, norms.
SMALL_ATTENTION, SMALL_BIAS, SMALL_NORMS = H * (Q + 2 * KV) + Q * H, Q + 2 * KV, 2 * H
SMALL_LAYER = SMALL_ATTENTION + SMALL_BIAS + SMALL_NORMS + 3 * H * F
SMALL_MOE_LAYER = SMALL_ATTENTION + SMALL_BIAS + SMALL_NORMS + EXPERTS * H + 3 * H * SHARED + H
SMALL_EXPERT = 3 * H * WIDTH
EMBEDDING = PADDED * H
PP3 = {"parallel": {"pipeline_model_parallel_size": 3}}


def stages_of(config, *, ranks=1, **sections):
    return memory_per_stage(changed(config, **sections), world_size=ranks)


@pytest.mark.parametrize(
    ("sections", "stage", "dense", "experts"),
    [
        ({}, 0, 2 * EMBEDDING + LAYERS * SMALL_MOE_LAYER + H, LAYERS * EXPERTS * SMALL_EXPERT),
        (PP3, 0, EMBEDDING + 2 * SMALL_MOE_LAYER, 2 * EXPERTS * SMALL_EXPERT),
        (PP3, 1, 2 * SMALL_MOE_LAYER, 2 * EXPERTS * SMALL_EXPERT),
        (PP3, 2, EMBEDDING + 2 * SMALL_MOE_LAYER + H, 2 * EXPERTS * SMALL_EXPERT),
        (
            {"model": {"share_embeddings_and_output_weights": True}},
            0,
            EMBEDDING + LAYERS * SMALL_MOE_LAYER + H,
            LAYERS * EXPERTS * SMALL_EXPERT,
        ),
        # Norms, router and gate are whole on each rank; TP 2 pads 200 rows to 256, of which a rank has 128.
        (
            {"parallel": {**tensor_parallel(2), "expert_model_parallel_size": 4}},
            0,
            EMBEDDING + LAYERS * ((SMALL_MOE_LAYER + SMALL_NORMS + EXPERTS * H + H) // 2) + H,
            LAYERS * EXPERTS * SMALL_EXPERT // 8,
        ),
        (
            {"model": {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}},
            0,
            2 * EMBEDDING + LAYERS * (SMALL_MOE_LAYER - 3 * H * SHARED - H) + H,
            LAYERS * EXPERTS * SMALL_EXPERT,
        ),
        # A norm of 8 channels for all heads of queries, and one for those of keys.
        (
            {"model": {"add_qkv_bias": False, "qk_layernorm": True}},
            0,
            2 * EMBEDDING + LAYERS * (SMALL_MOE_LAYER - SMALL_BIAS + 2 * 8) + H,
            LAYERS * EXPERTS * SMALL_EXPERT,
        ),
    ],
)
def test_scalars_of_an_moe_rank_by_hand(sections, stage, dense, experts):
    assert parameters_per_rank(changed(MOE, **sections), stage=stage) == (dense, experts)


def test_total_is_the_sum_of_all_parts_and_the_allowance():
    stage = StageMemory(0, 1, *(2.0**30 * power for power in (1, 2, 4, 8, 16)))
    assert stage.state_gib == 1 + 2 + 4
    assert stage.total_gib == 1 + 2 + 4 + 8 + 16 + ALLOWANCE_GIB


def test_weights_and_optimizer_state_in_a_checkpoint():
    """Weights of 2 or 4 bytes, and main weight and two moments of 4."""
    assert checkpoint_bytes(DENSE, parameters=1000) == 14_000
    assert checkpoint_bytes(changed(DENSE, precision={"dtype": "fp32"}), parameters=1000) == 16_000


AWARE = {"use_precision_aware_optimizer": True}


@pytest.mark.parametrize(
    ("sections", "optimizer", "gradient"),
    [
        ({}, 4 + 4 + 4, 4),
        ({"precision": AWARE}, 2 + 4 + 4, 4),
        ({"precision": {**AWARE, "exp_avg_dtype": "bf16"}}, 2 + 2 + 4, 4),
        ({"precision": {**AWARE, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "bf16"}}, 2 + 1 + 2, 4),
        ({"precision": {"grad_reduce_in_fp32": False}}, 4 + 4 + 4, 2),
        ({"precision": {"grad_reduce_in_fp32": False, "dtype": "fp32"}}, 4 + 4, 4),
        ({"performance": {"optimizer_offload_fraction": 0.75}}, (4 + 4 + 4) / 4, 4),
        ({"performance": {"optimizer_offload_fraction": 1.0}}, 0, 4),
    ],
)
def test_bytes_of_a_parameter_in_every_format(sections, optimizer, gradient):
    """Main weight (of a bf16 weight the bits that it lacks, or all), first and second moment; and the gradient."""
    (stage,) = stages_of(DENSE, **sections)
    assert stage.parameters == 2 * EMBEDDING + LAYERS * SMALL_LAYER + H
    assert stage.optimizer == optimizer * stage.parameters
    assert stage.gradients == gradient * stage.parameters


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2)])
def test_optimizer_state_of_dense_weights_and_of_experts_is_shared_by_other_ranks(ep, etp):
    """Two stages of 8 ranks, TP 2: a dense weight is on 4 ranks, a weight of a grid of 4 ranks on 2."""
    layout = {**tensor_parallel(2), "pipeline_model_parallel_size": 2}
    layout |= {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    for index, stage in enumerate(stages_of(MOE, ranks=16, parallel=layout)):
        dense, experts = parameters_per_rank(changed(MOE, parallel=layout), stage=index)
        assert stage.stage == index
        assert stage.parameters == dense + experts
        assert stage.optimizer == pytest.approx(12 * (dense / 4 + experts / 2))


@pytest.mark.parametrize(
    ("sections", "rows", "logits", "gradient"),
    [
        ({}, PADDED, 64, 2),
        ({"performance": {"cross_entropy_chunk_tokens": 64}}, PADDED, 64, 2),
        ({"performance": {"cross_entropy_chunk_tokens": 16}}, PADDED, 16, 2 + 4),
        ({"data": {"seq_length": 2048}}, PADDED, 4096, 2),
        ({"data": {"seq_length": 4096}}, PADDED, 4096, 2 + 4),
        ({"data": {"seq_length": 4096}, "parallel": {"context_parallel_size": 2}}, PADDED, 4096, 2),
        ({"parallel": tensor_parallel(2)}, PADDED // 2, 64, 2),
        ({"parallel": tensor_parallel(2), "model": {"vocab_size": 300}}, 512 // 2, 64, 2),
        ({"model": {"vocab_size": 257}}, 384, 64, 2),
    ],
)
def test_the_loss_needs_logits_of_a_chunk_and_the_gradient_of_the_output_matrix(sections, rows, logits, gradient):
    """In bf16; of several chunks of 4096 tokens the gradients are summed in fp32."""
    (stage,) = stages_of(DENSE, ranks=2, **sections)
    assert stage.loss == rows * (2 * logits + gradient * H)


def test_only_the_last_stage_computes_a_loss():
    first, middle, last = stages_of(DENSE, ranks=3, **PP3)
    assert (first.loss, middle.loss, last.loss) == (0, 0, PADDED * (2 * TOKENS + 2 * H))


TENSORWISE = {"fp8": "tensorwise"}


@pytest.mark.parametrize(
    ("precision", "in_fp8"),
    [
        ({"fp8": "delayed"}, (2, 2, 2)),
        ({**TENSORWISE, "first_last_layers_bf16": False}, (2, 2, 2)),
        (TENSORWISE, (1, 2, 1)),
        ({**TENSORWISE, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 2}, (2, 2, 0)),
        ({**TENSORWISE, "num_layers_at_start_in_bf16": 9}, (0, 2, 1)),
        ({**TENSORWISE, "emulate_fp8": True}, (0, 0, 0)),
    ],
)
@pytest.mark.parametrize(("config", "layer"), [(DENSE, SMALL_LAYER), (MOE, SMALL_MOE_LAYER + EXPERTS * SMALL_EXPERT)])
def test_fp8_weights_are_kept_beside_bf16_in_rows_and_in_columns(config, layer, precision, in_fp8):
    """Three stages of two layers; embeddings stay in bf16. The last norm, counted with the layers, is a thousandth."""
    stages = stages_of(config, ranks=3, precision=precision, **PP3)
    beside = [stage.weights - 2 * stage.parameters for stage in stages]
    assert beside[:2] == pytest.approx([2 * count * layer for count in in_fp8[:2]])
    assert beside[2] == pytest.approx(2 * in_fp8[2] * layer, rel=2e-3)


@pytest.mark.parametrize("words", [{}, {"share_embeddings_and_output_weights": True}], ids=["two matrices", "one"])
@pytest.mark.parametrize("tp", [1, 2])
def test_fp8_weights_of_a_single_stage(words, tp):
    precision = {**TENSORWISE, "num_layers_at_end_in_bf16": 2}
    (stage,) = stages_of(DENSE, precision=precision, model=words, parallel=tensor_parallel(tp))
    layer = (SMALL_LAYER - SMALL_NORMS) / tp + SMALL_NORMS
    assert stage.weights - 2 * stage.parameters == pytest.approx(2 * (LAYERS - 3) / LAYERS * (LAYERS * layer + H))
