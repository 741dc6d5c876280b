"""A run's configuration as megatron-core's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.models.apex_kernels import nvidia_apex_is_here
from megatron_qwen.models.backend import Backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(config: RunConfig, backend: Backend) -> TransformerConfig:
    """megatron-core's configuration of the model, its layout and its kernels.

    Raises:
        ConfigError: megatron-core has a rule that ``config/checks.py`` does not know.
    """
    try:
        return TransformerConfig(
            **_shape(config),
            **_experts(config),
            **_layout(config),
            **_numbers(config, backend),
            **_recompute(config),
            **_speed(config),
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(Problem("configuration", None, f"megatron-core rejects it: {error}")) from None


def _shape(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        # initialise.py draws the weights, with the same values under every layout.
        "perform_initialization": False,
    }


def _experts(config: RunConfig) -> dict[str, Any]:
    model = config.model
    if not model.is_moe:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_force_load_balancing": model.moe_router_force_load_balancing,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_router_dtype": "fp32",
        **_dispatch(config),
    }


def _dispatch(config: RunConfig) -> dict[str, Any]:
    performance = config.performance
    dispatcher = performance.moe_token_dispatcher or "alltoall"
    flex = dispatcher in ("deepep", "hybridep")
    settings: dict[str, Any] = {
        "moe_token_dispatcher_type": "flex" if flex else dispatcher,
        "moe_shared_expert_overlap": bool(performance.moe_shared_expert_overlap),
        "moe_grouped_gemm": bool(performance.moe_grouped_gemm),
        "moe_permute_fusion": bool(performance.fused_kernels),
    }
    return settings | ({"moe_flex_dispatcher_backend": dispatcher} if flex else {})


def _speed(config: RunConfig) -> dict[str, Any]:
    """What ``estimate/choices.py`` has chosen."""
    performance = config.performance
    settings: dict[str, Any] = {
        "apply_rope_fusion": bool(performance.fused_kernels),
        "bias_activation_fusion": bool(performance.fused_kernels),
        "bias_dropout_fusion": bool(performance.fused_kernels),
        "tp_comm_overlap": bool(performance.tp_comm_overlap),
        "fp8_param": bool(performance.fp8_param_gather),
        "cuda_graph_impl": performance.cuda_graph_impl or "none",
        # A graph needs fixed shapes, and the tokens per expert vary: experts stay outside the graph.
        "cuda_graph_modules": [],
    }
    if performance.cuda_graph_impl == "local" and config.model.is_moe:
        settings["cuda_graph_modules"] = ["attn", "moe_router"]
    if layers := performance.cpu_offloading_num_layers:
        settings |= {"cpu_offloading": True, "cpu_offloading_num_layers": layers}
    return settings


def _layout(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    virtual = parallel.virtual_stages
    interleaved = virtual > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if interleaved else None,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "overlap_p2p_comm": interleaved and parallel.overlap_p2p_comm,
        # With two pipeline ranks, batched sends give wrong gradients in the interleaved schedule.
        "batch_p2p_comm": not (interleaved and parallel.overlap_p2p_comm),
        "deallocate_pipeline_outputs": True,
        "pipeline_dtype": DTYPES[config.precision.dtype],
        "variable_seq_lengths": False,
    }


def _numbers(config: RunConfig, backend: Backend) -> dict[str, Any]:
    precision, te = config.precision, backend.name == "te"
    numbers: dict[str, Any] = {
        "bf16": precision.dtype == "bf16",
        "params_dtype": DTYPES[precision.dtype],
        # The loss is a sum over tokens; megatron-core divides gradients by the tokens of the global batch. A mean per
        # micro-batch would weigh masked tokens differently under different layouts.
        "calculate_per_token_loss": True,
        "transformer_impl": "transformer_engine" if te else "local",
        # Makes megatron-core use the activation module of the spec, here the torch backend's SwiGLU.
        "use_te_activation_func": not te,
        # Transformer Engine's layers get this from te_backend/provider.py.
        "gradient_accumulation_fusion": device.has_cuda()
        and not te
        and not precision.emulate_fp8
        and nvidia_apex_is_here(),
    }
    if precision.fp8:
        numbers |= {
            "first_last_layers_bf16": precision.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
        }
    if precision.fp8 and not precision.emulate_fp8:
        numbers |= {"fp8": "hybrid", "fp8_recipe": precision.fp8}
    if precision.fp8 == "delayed":  # megatron-core rejects first_last_layers_bf16 with it
        numbers |= {"first_last_layers_bf16": False, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return numbers


def _recompute(config: RunConfig) -> dict[str, Any]:
    training = config.training
    if training.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": training.recompute_method,
            "recompute_num_layers": training.recompute_num_layers,
        }
    if training.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    return {}
