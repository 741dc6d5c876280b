"""Builds megatron-core's distributed optimizer for a model."""

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.core_patches import precision_aware_state
from megatron_qwen.models.build import Model
from megatron_qwen.models.core_config import DTYPES
from megatron_qwen.optim import host_state

# Transformer Engine's Adam stores FP8 moments as uint8, with one scale per tensor.
_MOMENTS = {**DTYPES, "fp8": torch.uint8}


def build_optimizer(config: RunConfig, model: Model, groups: ProcessGroupCollection) -> ChainedOptimizer:
    """AdamW, sharded over the data-parallel ranks, without weight decay on norms and biases.

    ``get_megatron_optimizer`` takes the process groups from parallel_state, not from ``groups``: megatron-core creates
    the gloo counterparts of the data-parallel groups, which gather optimizer state for a checkpoint, only on that path.
    """
    optim, precision = config.optim, config.precision
    on_host = config.performance.optimizer_offload_fraction or 0.0
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=precision.dtype == "bf16",
        params_dtype=DTYPES[precision.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
        # With offload the main weights are on the host as well; only this switch stops megatron-core from keeping a
        # second copy on the device.
        use_precision_aware_optimizer=bool(precision.use_precision_aware_optimizer or on_host),
        fp8_recipe=precision.fp8 if config.performance.fp8_param_gather else None,
        optimizer_cpu_offload=on_host > 0,
        optimizer_offload_fraction=on_host,
        exp_avg_dtype=_MOMENTS[precision.exp_avg_dtype],
        exp_avg_sq_dtype=_MOMENTS[precision.exp_avg_sq_dtype],
    )
    optimizer = get_megatron_optimizer(settings, model.chunks)
    if config.lora.rank is not None:
        # With adapters of experts alone the dense part has no parameters on any rank, and a chain with an empty part
        # cannot be saved (megatron-core 0.19, ChainedOptimizer._synchronize_steps).
        parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
        optimizer.chained_optimizers = parts
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:  # this rank has no parameters of this kind (dense or expert)
            continue
        if precision.use_precision_aware_optimizer:
            precision_aware_state.apply(optimizer=part)
        # Moments from the start: a run may have to be saved before its first step was taken.
        if on_host:
            host_state.start(part.optimizer)
        else:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, rate: float, *, weight_decay: float) -> None:
    """Sets the learning rate and weight decay of the next step; norms and biases (wd_mult 0) keep a decay of 0."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
