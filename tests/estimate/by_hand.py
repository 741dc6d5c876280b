"""A dense and an MoE model of unequal widths, and a device of one FLOP and one byte a second, for counts by hand."""

from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig, TrainingConfig
from megatron_qwen.estimate.hardware import GemmRate, Hardware

# Hidden; queries of 4 heads of 8 channels; keys, as many as values, of 2 heads; SwiGLU.
H, Q, KV, F = 48, 32, 16, 100
LAYERS, VOCABULARY, PADDED = 6, 200, 256
EXPERTS, TOPK, WIDTH, SHARED = 8, 3, 28, 36
LENGTH, MICRO_BATCH = 32, 2
TOKENS = LENGTH * MICRO_BATCH

DENSE = RunConfig(
    recipe="custom",
    model=ModelConfig(
        num_layers=LAYERS,
        hidden_size=H,
        ffn_hidden_size=F,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    ),
    data=DataConfig(seq_length=LENGTH),
    training=TrainingConfig(micro_batch_size=MICRO_BATCH, global_batch_size=24),
)
MOE = DENSE.with_section(
    "model",
    num_moe_experts=EXPERTS,
    moe_router_topk=TOPK,
    moe_ffn_hidden_size=WIDTH,
    moe_shared_expert_intermediate_size=SHARED,
    moe_shared_expert_gate=True,
)


def rate(flops: float, *, launch_s: float = 0.0) -> GemmRate:
    """GEMMs at ``flops`` FLOP/s, whose memory accesses are hidden."""
    return GemmRate(tflops=flops / 1e12, exposed_traffic=0.0, launch_us=launch_s * 1e6, element_bytes=2.0)


# Where two figures could be mistaken for each other, they differ: FP8 and the backward pass of attention run at twice
# the rate, and the network at a quarter of NVLink's. Kernels are launched in no time.
DEVICE = Hardware(
    name="by hand",
    memory_gib=1.0,
    peak_tflops=1e-12,
    bf16=rate(1.0),
    fp8=rate(2.0),
    attention_tflops=(1e-12, 2e-12),
    memory_gb_s=1e-9,
    nvlink_gb_s=1e-9,
    network_gb_s=0.25e-9,
    devices_per_node=4,
    host_us_per_layer=0.0,
    source="invented",
)


def tensor_parallel(size: int) -> dict[str, Any]:
    """The fields of ``parallel`` for tensor and sequence parallelism."""
    return {"tensor_model_parallel_size": size, "sequence_parallel": size > 1}


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """A copy with some fields of some sections replaced."""
    for section, fields in sections.items():
        config = config.with_section(section, **fields)
    return config
