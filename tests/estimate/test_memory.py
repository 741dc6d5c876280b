"""The estimate's exact parts against real ranks and a real checkpoint, its peaks against those of an H200."""

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.estimate.memory import ALLOWANCE_GIB, checkpoint_bytes, memory_per_stage, parameters_per_rank
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.estimate.speed import expected_speed
from megatron_qwen.recipes.registry import RECIPES

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
