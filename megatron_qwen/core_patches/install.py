"""Makes a process ready for megatron-core: its settings, and the patches in the order that they need.

Every entry point that builds or runs a model calls ``prepare_process`` first, before anything imports megatron.core;
no module calls it at import. Where there is a GPU the patches that stand for one are left out.

Four patches are applied by the code that needs them, at the moment that it does: plain_objects by
checkpoint/metadata.py, results_queue by checkpoint/write.py, precision_aware_state by optim/build.py on each optimizer,
and compiler_settings by models/torch_backend/compiled.py.
"""

from megatron_qwen import device, process_settings
from megatron_qwen.core_patches import (
    cuda_calls,
    cuda_factories,
    cuda_tensors,
    expert_bias,
    expert_splits,
    gpu_libraries,
    gradient_clipping,
    group_step_adam,
    lazy_jit,
    lone_collectives,
    padded_routing,
    shared_expert_gate,
    shared_gloo_device,
    state_gather,
    timed_waits,
    uneven_collectives,
)


def prepare_process() -> None:
    """Makes megatron-core importable and runnable on this machine; a second call changes nothing."""
    gpu = device.has_cuda()
    process_settings.apply(gpu=gpu)
    _before_core(gpu=gpu)
    _after_core(gpu=gpu)


def _before_core(*, gpu: bool) -> None:
    """What megatron-core binds or decorates with when it is imported."""
    lazy_jit.apply()
    shared_gloo_device.apply()
    if gpu:
        return
    gpu_libraries.apply()
    cuda_calls.apply()
    cuda_factories.apply()
    cuda_tensors.apply()
    uneven_collectives.apply()
    lone_collectives.apply()
    timed_waits.apply()


def _after_core(*, gpu: bool) -> None:
    """What is replaced in megatron-core itself, which these import."""
    if not gpu:
        expert_splits.apply()
        shared_expert_gate.apply()
    expert_bias.apply()
    padded_routing.apply()
    group_step_adam.apply()
    gradient_clipping.apply()
    state_gather.apply()
