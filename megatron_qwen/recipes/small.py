"""Recipes for a CPU: tiny models for tests, and the model of ``mq demo``."""

from dataclasses import replace
from typing import Any

from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import (
    DataConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PerformanceConfig,
    PrecisionConfig,
    RopeConfig,
    TrainingConfig,
)

_TINY_OPTIM = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, lr_warmup_iters=2)
_TINY_TRAINING = TrainingConfig(train_iters=10, micro_batch_size=1, global_batch_size=4, eval_interval=5, eval_iters=1)
_TINY_DATA = DataConfig(seq_length=64, validation_fraction=0.1)
_FP32 = PrecisionConfig(dtype="fp32")
# Operations of a few microseconds: waking a second thread for each costs more than it brings.
_ONE_THREAD = PerformanceConfig(threads_per_rank=1)
_QWEN3: dict[str, Any] = {"kv_channels": 32, "add_qkv_bias": False, "qk_layernorm": True}


def tiny_dense() -> RunConfig:
    """A dense model of 0.2M parameters with every feature of the family: GQA, QKV bias, untied embeddings."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        vocab_size=320,
        max_position_embeddings=256,
    )
    return RunConfig(
        recipe="tiny_dense",
        model=model,
        precision=_FP32,
        data=_TINY_DATA,
        optim=_TINY_OPTIM,
        training=_TINY_TRAINING,
        performance=_ONE_THREAD,
    )


def tiny_moe() -> RunConfig:
    """An MoE model with 4 experts, top-2 routing, a gated shared expert and both router losses."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        vocab_size=320,
        max_position_embeddings=256,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        moe_shared_expert_intermediate_size=128,
        moe_shared_expert_gate=True,
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=0.001,
    )
    return RunConfig(
        recipe="tiny_moe",
        model=model,
        precision=_FP32,
        data=_TINY_DATA,
        optim=_TINY_OPTIM,
        training=_TINY_TRAINING,
        performance=_ONE_THREAD,
    )


def tiny_qwen3() -> RunConfig:
    """The dense one with Qwen3's attention: normalised heads, no bias, heads wider than hidden / heads."""
    base = tiny_dense()
    return replace(base, recipe="tiny_qwen3", model=replace(base.model, **_QWEN3))


def tiny_qwen3_moe() -> RunConfig:
    """An MoE model with Qwen3's attention, no shared expert and renormalised routing weights."""
    base = tiny_moe()
    routing: dict[str, Any] = {
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "moe_router_pre_softmax": False,
    }
    return replace(base, recipe="tiny_qwen3_moe", model=replace(base.model, **_QWEN3, **routing))


def demo() -> RunConfig:
    """The model of `mq demo`: 2M parameters, learnt from Python source on two CPU ranks in minutes.

    So small because a few minutes of two cores are about 10^13 FLOPs, for which Chinchilla's rule (Hoffmann et al.
    2022: about 20 tokens a parameter) asks for a model of this order.
    """
    model = ModelConfig(
        num_layers=4,
        hidden_size=192,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=512,
        vocab_size=2048,
        max_position_embeddings=1024,
        share_embeddings_and_output_weights=True,
    )
    return RunConfig(
        recipe="demo",
        model=model,
        rope=RopeConfig(base=10_000.0),
        precision=_FP32,
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        data=DataConfig(seq_length=256, validation_fraction=0.02),
        optim=OptimConfig(
            learning_rate=4e-3, min_learning_rate=2e-4, lr_decay_style="wsd", lr_warmup_iters=30, lr_wsd_decay_iters=120
        ),
        training=TrainingConfig(
            train_iters=350, micro_batch_size=8, global_batch_size=16, eval_interval=50, eval_iters=4
        ),
        checkpoint=CheckpointConfig(save_interval=200, keep_last=2),
        metrics=MetricsConfig(log_interval=10),
    )
