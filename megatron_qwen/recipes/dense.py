"""The seven dense Qwen2.5 sizes.

Shapes: Qwen2.5 Technical Report (arXiv 2412.15115, table 1) and the released config.json files. The report does not
publish learning rate, batch size and schedule of pretraining, so these come from open models of the same size:

- up to 3B from TinyLlama 1.1B (arXiv 2401.02385, section 2.3): 4e-4 to 4e-5, cosine, 2000 warm-up steps, 2M tokens per
  batch;
- above from Llama 2 (arXiv 2307.09288, section 2.2): 3e-4 up to 13B and 1.5e-4 beyond, decay to a tenth, 4M tokens per
  batch.

Both use AdamW with betas 0.9 and 0.95, weight decay 0.1 and gradient clipping at 1.0. RoPE base and sequence length are
those of the report's first stage (4096 tokens, base 10,000); the released base of 1,000,000 belongs to its last stage.
"""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ModelConfig, OptimConfig, ParallelConfig, RopeConfig, TrainingConfig

ROPE = RopeConfig(base=10_000.0)
SMALL_OPTIM = OptimConfig(learning_rate=4e-4, min_learning_rate=4e-5, lr_warmup_iters=2000)
MIDDLE_OPTIM = OptimConfig(learning_rate=3e-4, min_learning_rate=3e-5, lr_warmup_iters=2000)
LARGE_OPTIM = OptimConfig(learning_rate=1.5e-4, min_learning_rate=1.5e-5, lr_warmup_iters=2000)
# 512 and 1024 sequences of 4096 tokens are the 2M and 4M tokens per batch named above. 100,000 steps are a placeholder
# for the length of a run, chosen by hand: 0.2 and 0.4 trillion tokens.
SMALL_BATCH = TrainingConfig(train_iters=100_000, global_batch_size=512, eval_interval=1000)
LARGE_BATCH = TrainingConfig(train_iters=100_000, global_batch_size=1024, eval_interval=1000)


def _model(**shape: object) -> ModelConfig:
    base: dict[str, object] = {"kv_channels": 128, "vocab_size": 152064, "max_position_embeddings": 131072}
    return ModelConfig(**{**base, **shape})  # type: ignore[arg-type]


def qwen2_5_0_5b() -> RunConfig:
    """Qwen2.5-0.5B: one GPU per model replica."""
    model = _model(
        num_layers=24,
        hidden_size=896,
        num_attention_heads=14,
        num_query_groups=2,
        kv_channels=64,
        ffn_hidden_size=4864,
        vocab_size=151936,
        max_position_embeddings=32768,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(recipe="qwen2_5_0_5b", model=model, rope=ROPE, optim=SMALL_OPTIM, training=SMALL_BATCH)


def qwen2_5_1_5b() -> RunConfig:
    """Qwen2.5-1.5B: one GPU per model replica."""
    model = _model(
        num_layers=28,
        hidden_size=1536,
        num_attention_heads=12,
        num_query_groups=2,
        ffn_hidden_size=8960,
        vocab_size=151936,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(recipe="qwen2_5_1_5b", model=model, rope=ROPE, optim=SMALL_OPTIM, training=SMALL_BATCH)


def qwen2_5_3b() -> RunConfig:
    """Qwen2.5-3B: one GPU per model replica."""
    model = _model(
        num_layers=36,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=2,
        ffn_hidden_size=11008,
        vocab_size=151936,
        max_position_embeddings=32768,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(recipe="qwen2_5_3b", model=model, rope=ROPE, optim=SMALL_OPTIM, training=SMALL_BATCH)


def qwen2_5_7b() -> RunConfig:
    """Qwen2.5-7B: two GPUs per model replica; 4 KV heads limit TP to 4."""
    model = _model(num_layers=28, hidden_size=3584, num_attention_heads=28, num_query_groups=4, ffn_hidden_size=18944)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    return RunConfig(
        recipe="qwen2_5_7b", model=model, rope=ROPE, parallel=parallel, optim=MIDDLE_OPTIM, training=LARGE_BATCH
    )


def qwen2_5_14b() -> RunConfig:
    """Qwen2.5-14B: four GPUs per model replica."""
    model = _model(
        num_layers=48,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        ffn_hidden_size=13824,
        layernorm_epsilon=1e-5,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    return RunConfig(
        recipe="qwen2_5_14b", model=model, rope=ROPE, parallel=parallel, optim=MIDDLE_OPTIM, training=LARGE_BATCH
    )


def qwen2_5_32b() -> RunConfig:
    """Qwen2.5-32B: 16 GPUs per model replica; TP within a node."""
    model = _model(
        num_layers=64,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        ffn_hidden_size=27648,
        layernorm_epsilon=1e-5,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
    )
    return RunConfig(
        recipe="qwen2_5_32b", model=model, rope=ROPE, parallel=parallel, optim=LARGE_OPTIM, training=LARGE_BATCH
    )


def qwen2_5_72b() -> RunConfig:
    """Qwen2.5-72B: 32 GPUs per model replica; TP within a node, interleaved pipeline across nodes."""
    model = _model(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=29568,
        layernorm_epsilon=1e-5,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=5,
    )
    return RunConfig(
        recipe="qwen2_5_72b", model=model, rope=ROPE, parallel=parallel, optim=LARGE_OPTIM, training=LARGE_BATCH
    )
