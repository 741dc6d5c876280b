"""Supervised fine-tuning of the Qwen2.5 models, as far as it is published.

Qwen2.5 Technical Report (arXiv 2412.15115), section 4.1: more than a million examples, two epochs, sequences of 32,768
tokens, a learning rate that falls from 7e-6 to 7e-7, weight decay 0.1, gradient clipping at 1.0. Section 4 of Turbo: a
first stage of conversations of at most 32,768 tokens, a second one that mixes them with some of up to 262,144.

Not published and chosen by hand: the curve of the learning rate (cosine, no warm-up), the batch (64 packed rows, 2M
tokens), and with it the number of steps: 1,000 are two epochs of a million conversations of 1,000 tokens each. The RoPE
base is that of the released models, 1,000,000. ``checkpoint.load`` must name the base model.

Packed rows cannot be split over context-parallel ranks in the te backend, so the layouts have none.
"""

from dataclasses import replace

from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, OptimConfig, ParallelConfig, RopeConfig, TrainingConfig
from megatron_qwen.recipes import dense, moe

LENGTH, LONG = 32_768, 262_144
OPTIM = OptimConfig(learning_rate=7e-6, min_learning_rate=7e-7, weight_decay=0.1, clip_grad=1.0, lr_warmup_iters=0)
BATCH = TrainingConfig(train_iters=1000, global_batch_size=64, eval_interval=100)
TP4, TP8 = (ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=True) for size in (4, 8))


def tuned(base: RunConfig, *, parallel: ParallelConfig | None = None, positions: int = LENGTH) -> RunConfig:
    """The fine-tuning of a base model; ``positions`` of the model that comes out."""
    return replace(
        base,
        recipe=f"{base.recipe}_instruct",
        model=replace(base.model, max_position_embeddings=positions),
        rope=RopeConfig(base=max(base.rope.base, 1_000_000.0)),
        parallel=parallel or base.parallel,
        data=DataConfig(seq_length=LENGTH),
        optim=OPTIM,
        training=BATCH,
        objective=ObjectiveConfig(kind="sft"),
    )


def qwen2_5_0_5b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-0.5B: one GPU per model replica."""
    return tuned(dense.qwen2_5_0_5b())


def qwen2_5_1_5b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-1.5B: one GPU per model replica."""
    return tuned(dense.qwen2_5_1_5b())


def qwen2_5_3b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-3B: two GPUs per model replica."""
    return tuned(dense.qwen2_5_3b(), parallel=replace(TP4, tensor_model_parallel_size=2))


def qwen2_5_7b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-7B: four GPUs per model replica."""
    return tuned(dense.qwen2_5_7b(), parallel=TP4)


def qwen2_5_14b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-14B: eight GPUs per model replica."""
    return tuned(dense.qwen2_5_14b(), parallel=TP8)


def qwen2_5_32b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-32B: 16 GPUs per model replica."""
    return tuned(dense.qwen2_5_32b())


def qwen2_5_72b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-72B: 32 GPUs per model replica."""
    return tuned(dense.qwen2_5_72b())


def qwen1_5_moe_a2_7b_instruct() -> RunConfig:
    """Fine-tuning of Qwen1.5-MoE-A2.7B by the numbers of Qwen2.5: rows of its 8,192 positions, EP 4."""
    config = tuned(moe.qwen1_5_moe_a2_7b(), positions=8192)
    return replace(
        config, data=DataConfig(seq_length=8192), training=replace(BATCH, global_batch_size=256), rope=RopeConfig()
    )


def qwen2_57b_a14b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2-57B-A14B by the numbers of Qwen2.5: EP 8, TP 2, PP 4."""
    return tuned(moe.qwen2_57b_a14b())


def qwen2_5_turbo_standin_instruct() -> RunConfig:
    """STAND-IN for Qwen2.5-Turbo: the first stage, conversations of at most 32,768 tokens."""
    return tuned(moe.qwen2_5_turbo_standin(), positions=LONG)


def qwen2_5_turbo_standin_instruct_long() -> RunConfig:
    """STAND-IN for Qwen2.5-Turbo: the second stage, mixed with conversations of up to 262,144 tokens."""
    first = qwen2_5_turbo_standin_instruct()
    return replace(
        first,
        recipe="qwen2_5_turbo_standin_instruct_long",
        data=DataConfig(seq_length=LONG),
        training=replace(BATCH, global_batch_size=8),  # the same number of tokens
        parallel=replace(first.parallel, tensor_model_parallel_size=4, sequence_parallel=True),
    )


def qwen2_5_plus_standin_instruct() -> RunConfig:
    """STAND-IN for Qwen2.5-Plus: its fine-tuning."""
    return tuned(moe.qwen2_5_plus_standin())
