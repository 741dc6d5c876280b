"""Training speeds that others have published, and ours, each as a configuration that the estimate can predict."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.recipes.registry import RECIPES

ARCHIVE = "Megatron-Bridge, performance summary and archive"
CARDS = "Megatron-Bridge, model cards of Qwen3"


@dataclass(frozen=True)
class PublishedStep:
    """A speed and where it was reached.

    Args:
        name: what ran.
        config: shape, layout and batch.
        gpu: kind of device.
        devices: how many.
        tokens_per_second: of one device.
        assumptions: further conditions of the source.
        source: who published it.
    """

    name: str
    config: RunConfig
    gpu: str
    devices: int
    tokens_per_second: float
    assumptions: Assumptions
    source: str


def model(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, **more: Any) -> ModelConfig:
    """A shape of 128 channels a head."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocabulary,
        kv_channels=128,
        max_position_embeddings=131_072,
        **more,
    )


LLAMA3_8B = model(32, 4096, 14_336, 32, 8, 128_256)
LLAMA3_70B = model(80, 8192, 28_672, 64, 8, 128_256)
# 126 layers, of which the first and the last of 64 virtual stages hold one: every other holds two.
LLAMA3_405B = model(128, 16_384, 53_248, 128, 8, 128_256)
QWEN3_8B = model(36, 4096, 12_288, 32, 8, 151_936)
QWEN3_30B = model(
    48, 2048, 6144, 32, 4, 151_936, num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=768
)  # fmt: skip


def _run(
    shape: ModelConfig,
    *,
    seq: int,
    micro: int,
    batch: int,
    fp8: str | None = None,
    recompute: str | None = None,
    **parallel: Any,
) -> RunConfig:
    modules: tuple[Any, ...] = ("mlp",) if recompute == "selective" else ("core_attn",)
    training: dict[str, Any] = {"recompute_granularity": recompute, "recompute_modules": modules}
    precision: dict[str, Any] = {"fp8": fp8}
    return RunConfig(
        recipe="custom",
        model=shape,
        parallel=ParallelConfig(**{"overlap_grad_reduce": True, "overlap_param_gather": True, **parallel}),
        precision=PrecisionConfig(**precision),
        data=DataConfig(seq_length=seq),
        training=TrainingConfig(micro_batch_size=micro, global_batch_size=batch, **training),
    )


def published_steps() -> Iterator[PublishedStep]:
    """Every row of shared facts that names its configuration."""
    dense, moe = Assumptions(), Assumptions(deduplicated=True)
    yield PublishedStep(
        "Llama-3 8B, full recompute, bf16", _run(LLAMA3_8B, seq=4096, micro=4, batch=4, recompute="full"),
        "h200", 1, 10_471, dense, "KempnerForge, benchmarks/mfu_scaling",
    )  # fmt: skip
    yield PublishedStep(
        "Qwen3-8B, DP16, bf16", _run(QWEN3_8B, seq=4096, micro=1, batch=1024), "h100", 16, 10_456, dense, CARDS
    )
    experts = _run(QWEN3_30B, seq=4096, micro=1, batch=1024, expert_model_parallel_size=16)
    yield PublishedStep("Qwen3-30B-A3B, EP16, balanced routing, bf16", experts, "h100", 16, 13_010, moe, CARDS)
    natural = Assumptions(deduplicated=True, imbalance=2.0)
    yield PublishedStep("Qwen3-30B-A3B, EP16, natural routing, bf16", experts, "h100", 16, 8655, natural, CARDS)
    overlapped = Assumptions(tensor_overlap=0.5)
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 8,
        "sequence_parallel": True,
    }
    large = _run(
        LLAMA3_70B, seq=8192, micro=1, batch=256, fp8="tensorwise", virtual_pipeline_model_parallel_size=5, **layout
    )
    yield PublishedStep("Llama-3 70B, TP4 PP8x5, fp8", large, "h100", 64, 1664, overlapped, ARCHIVE)
    yield PublishedStep(
        "Llama-3 8B, DP8, fp8", _run(LLAMA3_8B, seq=8192, micro=1, batch=128, fp8="tensorwise"),
        "h100", 8, 14_451, dense, ARCHIVE,
    )  # fmt: skip
    layout |= {"tensor_model_parallel_size": 8, "context_parallel_size": 2, "virtual_pipeline_model_parallel_size": 8}
    largest = _run(LLAMA3_405B, seq=8192, micro=1, batch=1536, fp8="tensorwise", **layout)
    yield PublishedStep("Llama-3.1 405B, TP8 PP8x8 CP2, fp8", largest, "h100", 1024, 328, overlapped, ARCHIVE)
    # It recomputes every second GEMM; the nearest that the estimate knows is the feed-forward.
    capped = Assumptions(power=500 / 700)
    for fp8, speed in ((None, 6667.0), ("tensorwise", 8532.0)):
        sharded = _run(LLAMA3_8B, seq=8192, micro=1, batch=8, fp8=fp8, recompute="selective")
        name = f"Llama-3.1 8B, FSDP8 at 500 W, {'fp8' if fp8 else 'bf16'}"
        yield PublishedStep(name, sharded, "h100", 8, speed, capped, "torchtitan, benchmarks")


def measured_steps() -> Iterator[PublishedStep]:
    """Ours (benchmarks/results/h200_gpu_step.json)."""
    source, plain = "benchmarks/results/h200_gpu_step.json", Assumptions()
    shape = RECIPES["qwen2_5_7b"]().model
    for name, fp8, micro, batch, speed in (
        ("Qwen2.5-7B, batch 2 / 32, bf16", None, 2, 32, 12_540.0),
        ("Qwen2.5-7B, batch 1 / 8, bf16", None, 1, 8, 11_743.0),
        ("Qwen2.5-7B, batch 1 / 8, fp8", "tensorwise", 1, 8, 15_356.0),
        ("Qwen2.5-7B, batch 2 / 32, fp8", "tensorwise", 2, 32, 17_363.0),
    ):
        config = _run(shape, seq=4096, micro=micro, batch=batch, fp8=fp8)
        yield PublishedStep(name, config, "h200", 1, speed, plain, source)
    for recipe, fp8, micro, speed in (
        ("qwen2_5_1_5b", None, 2, 47_231.0),
        ("qwen2_5_0_5b", None, 4, 113_796.0),
        ("qwen2_5_0_5b", "tensorwise", 4, 118_653.0),
    ):
        config = _run(RECIPES[recipe]().model, seq=4096, micro=micro, batch=16, fp8=fp8)
        yield PublishedStep(f"{recipe}, {'fp8' if fp8 else 'bf16'}", config, "h200", 1, speed, plain, source)
    four_layers = replace(QWEN3_30B, num_layers=4)
    config = _run(four_layers, seq=4096, micro=2, batch=16)
    yield PublishedStep("4 layers of Qwen3-30B-A3B, bf16", config, "h200", 1, 44_645.0, plain, source)
