"""Qwen3: six dense sizes and two mixture-of-experts (MoE) sizes.

Shapes: Qwen3 Technical Report (arXiv 2505.09388, tables 1 and 2) and the released config.json files. What sets the
family apart from Qwen2.5: RMSNorm on every query and key head, no bias on Q, K and V, a head dimension of 128 whatever
the width, and in MoE models no shared expert and renormalised routing weights. The report does not publish
learning rates and batches, so these are those of the Qwen2.5 recipes of like size (``dense.py``, ``moe.py`` say where
they come from). RoPE base and sequence are those of the report's first stage (4096 tokens, base 10,000, section 3.2);
the releases' base of 1,000,000 belongs to its last stage.
"""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ModelConfig, ParallelConfig
from megatron_qwen.recipes import dense, moe


def _model(**shape: object) -> ModelConfig:
    base: dict[str, object] = {
        "kv_channels": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "add_qkv_bias": False,
        "qk_layernorm": True,
    }
    return ModelConfig(**{**base, **shape})  # type: ignore[arg-type]


def qwen3_0_6b() -> RunConfig:
    """Qwen3-0.6B: one GPU per model replica."""
    model = _model(
        num_layers=28,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=8,
        ffn_hidden_size=3072,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(
        recipe="qwen3_0_6b", model=model, rope=dense.ROPE, optim=dense.SMALL_OPTIM, training=dense.SMALL_BATCH
    )


def qwen3_1_7b() -> RunConfig:
    """Qwen3-1.7B: one GPU per model replica."""
    model = _model(
        num_layers=28,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=8,
        ffn_hidden_size=6144,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(
        recipe="qwen3_1_7b", model=model, rope=dense.ROPE, optim=dense.SMALL_OPTIM, training=dense.SMALL_BATCH
    )


def qwen3_4b() -> RunConfig:
    """Qwen3-4B: two GPUs per model replica."""
    model = _model(
        num_layers=36,
        hidden_size=2560,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=9728,
        share_embeddings_and_output_weights=True,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    return RunConfig(
        recipe="qwen3_4b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=dense.SMALL_OPTIM,
        training=dense.SMALL_BATCH,
    )


def qwen3_8b() -> RunConfig:
    """Qwen3-8B: two GPUs per model replica."""
    model = _model(num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=12288)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    return RunConfig(
        recipe="qwen3_8b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=dense.MIDDLE_OPTIM,
        training=dense.LARGE_BATCH,
    )


def qwen3_14b() -> RunConfig:
    """Qwen3-14B: four GPUs per model replica."""
    model = _model(num_layers=40, hidden_size=5120, num_attention_heads=40, num_query_groups=8, ffn_hidden_size=17408)
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    return RunConfig(
        recipe="qwen3_14b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=dense.MIDDLE_OPTIM,
        training=dense.LARGE_BATCH,
    )


def qwen3_32b() -> RunConfig:
    """Qwen3-32B: 16 GPUs per model replica; TP within a node."""
    model = _model(num_layers=64, hidden_size=5120, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=25600)
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
    )
    return RunConfig(
        recipe="qwen3_32b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=dense.LARGE_OPTIM,
        training=dense.LARGE_BATCH,
    )


def qwen3_30b_a3b() -> RunConfig:
    """Qwen3-30B-A3B: 128 experts over 8 GPUs."""
    model = _model(
        num_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        ffn_hidden_size=6144,
        num_moe_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
        moe_router_pre_softmax=False,
    )
    parallel = ParallelConfig(expert_model_parallel_size=8)
    return RunConfig(
        recipe="qwen3_30b_a3b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=moe.SMALL_OPTIM,
        training=moe.BATCH,
    )


def qwen3_235b_a22b() -> RunConfig:
    """Qwen3-235B-A22B: 128 experts over 8 GPUs, eight uneven pipeline ranks."""
    model = _model(
        num_layers=94,
        hidden_size=4096,
        num_attention_heads=64,
        num_query_groups=4,
        ffn_hidden_size=12288,
        num_moe_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=1536,
        moe_router_pre_softmax=False,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        pipeline_model_parallel_size=8,
        num_layers_in_first_pipeline_stage=11,
        num_layers_in_last_pipeline_stage=11,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    )
    return RunConfig(
        recipe="qwen3_235b_a22b",
        model=model,
        rope=dense.ROPE,
        parallel=parallel,
        optim=moe.LARGE_OPTIM,
        training=moe.BATCH,
    )
