"""Mixture-of-experts (MoE) models: two public relatives of Qwen2.5, and stand-ins for its two unpublished models.

Shapes of the relatives: the released config.json files of Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B. Learning rates: those
of DeepSeekMoE 16B (arXiv 2401.06066: 4.2e-4) and DeepSeek-V2 (arXiv 2405.04434: 2.4e-4), both with AdamW, betas 0.9 and
0.95, weight decay 0.1, gradient clipping at 1.0 and 2000 warm-up steps. Batch sizes are chosen by hand.

Stand-ins. The Qwen2.5 report says of Turbo and Plus only that they use fine-grained and shared experts, and that Turbo
is on par with the dense 14B and Plus with the dense 72B. It publishes no number of layers, width or number of experts.
Qwen2-57B-A14B has 14.2B active parameters, and its report (arXiv 2407.10671) compares it with dense models of about
30B: a ratio of active to dense parameters of 0.47. The stand-ins keep that model's proportions (64 experts, top-8
routing, a shared expert as wide as eight routed ones) and this ratio: 6.8B active of 26.2B for a dense 14.8B, 34.8B
active of 140.5B for a dense 72.7B. They are not the released models.
"""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ModelConfig, OptimConfig, ParallelConfig, RopeConfig, TrainingConfig

SMALL_OPTIM = OptimConfig(learning_rate=4.2e-4, min_learning_rate=4.2e-5, lr_warmup_iters=2000)
LARGE_OPTIM = OptimConfig(learning_rate=2.4e-4, min_learning_rate=2.4e-5, lr_warmup_iters=2000)
BATCH = TrainingConfig(train_iters=100_000, global_batch_size=1024, eval_interval=1000)


def qwen1_5_moe_a2_7b() -> RunConfig:
    """Qwen1.5-MoE-A2.7B: 60 experts, EP 4."""
    model = ModelConfig(
        num_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=16,
        ffn_hidden_size=5632,
        vocab_size=151936,
        max_position_embeddings=8192,
        num_moe_experts=60,
        moe_router_topk=4,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=5632,
        moe_shared_expert_gate=True,
    )
    return RunConfig(
        recipe="qwen1_5_moe_a2_7b",
        model=model,
        parallel=ParallelConfig(expert_model_parallel_size=4),
        optim=SMALL_OPTIM,
        training=BATCH,
    )


def qwen2_57b_a14b() -> RunConfig:
    """Qwen2-57B-A14B: 64 experts, EP 8, TP 2, PP 4."""
    model = ModelConfig(
        num_layers=28,
        hidden_size=3584,
        num_attention_heads=28,
        num_query_groups=4,
        ffn_hidden_size=18944,
        vocab_size=151936,
        max_position_embeddings=131072,
        num_moe_experts=64,
        moe_router_topk=8,
        moe_ffn_hidden_size=2560,
        moe_shared_expert_intermediate_size=20480,
        moe_shared_expert_gate=True,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    )
    return RunConfig(recipe="qwen2_57b_a14b", model=model, parallel=parallel, optim=LARGE_OPTIM, training=BATCH)


def qwen2_5_turbo_standin() -> RunConfig:
    """STAND-IN for Qwen2.5-Turbo, whose shape is unpublished: sized to match a dense 14B."""
    model = ModelConfig(
        num_layers=32,
        hidden_size=2560,
        num_attention_heads=20,
        num_query_groups=4,
        ffn_hidden_size=11264,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=262144,
        num_moe_experts=64,
        moe_router_topk=8,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=11264,
        moe_shared_expert_gate=True,
    )
    parallel = ParallelConfig(expert_model_parallel_size=8, pipeline_model_parallel_size=2)
    return RunConfig(
        recipe="qwen2_5_turbo_standin",
        model=model,
        rope=RopeConfig(base=10_000_000.0),
        parallel=parallel,
        optim=LARGE_OPTIM,
        training=BATCH,
    )


def qwen2_5_plus_standin() -> RunConfig:
    """STAND-IN for Qwen2.5-Plus, whose shape is unpublished: sized to match a dense 72B."""
    model = ModelConfig(
        num_layers=48,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        ffn_hidden_size=20480,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=131072,
        num_moe_experts=64,
        moe_router_topk=8,
        moe_ffn_hidden_size=2560,
        moe_shared_expert_intermediate_size=20480,
        moe_shared_expert_gate=True,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        pipeline_model_parallel_size=8,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    )
    return RunConfig(recipe="qwen2_5_plus_standin", model=model, parallel=parallel, optim=LARGE_OPTIM, training=BATCH)
