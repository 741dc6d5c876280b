"""The backend of Transformer Engine's modules: fused norm + linear, FP8, grouped GEMM. GPUs only."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig


def is_installed() -> bool:
    """Whether there is a Transformer Engine to import; not whether that succeeds."""
    return importlib.util.find_spec("transformer_engine") is not None


def why_not() -> str | None:
    """Why Transformer Engine cannot run on this machine; None where it can."""
    if not device.has_cuda():
        return "there is no CUDA device"
    if not is_installed():
        return "transformer_engine is not installed (./mq setup --gpu)"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return f"transformer_engine cannot be imported ({error})"
    return None


def why_not_fp8(recipe: str) -> str | None:
    """Why the GPU cannot run an FP8 recipe; None where it can."""
    major = device.compute_capability()[0]
    if recipe == "mxfp8" and major < 10:
        return "mxfp8 needs a Blackwell GPU"
    if major < 9 and device.compute_capability() != (8, 9):
        return "FP8 needs an Ada, Hopper or newer GPU"
    return None


def add_into_main_gradients(modules: Iterable[torch.nn.Module]) -> None:
    """Makes weight-gradient GEMMs accumulate into the fp32 main gradients, without a bf16 gradient in between.

    megatron-core's switch for it (gradient_accumulation_fusion) asks NVIDIA's apex for its own output layer as well,
    whose gradient is computed in objectives/cross_entropy.py. Transformer Engine's layers need no apex, so the switch
    is set on them, except where weights are frozen: those have no main gradients.
    """
    for module in modules:
        for layer in module.modules():
            if hasattr(layer, "fuse_wgrad_accumulation") and any(one.requires_grad for one in layer.parameters()):
                setattr(layer, "fuse_wgrad_accumulation", True)  # noqa: B010


def start_tensor_overlap(config: RunConfig) -> None:
    """Creates the buffers through which Transformer Engine overlaps tensor-parallel communication with GEMMs.

    Call it after the process groups exist and before the layers are built.
    """
    from transformer_engine.pytorch.module.base import initialize_ub

    parallel, training = config.parallel, config.training
    tokens = config.data.seq_length * training.micro_batch_size // parallel.context_parallel_size
    initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=parallel.tensor_model_parallel_size,
        use_fp8=config.precision.fp8 is not None,
        bootstrap_backend="nccl",
    )


def fp8_gemms(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three GEMMs of a linear layer in FP8 with current scaling, for a check of the installation.

    Args:
        x: [tokens, in], bf16.
        weight: [out, in].
        gradient: of the output, [tokens, out].

    Returns:
        Output [tokens, out], gradient of x [tokens, in] and gradient of the weight [out, in].
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    layer = te.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=x.dtype, device=x.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x = x.detach().requires_grad_()
    recipe = Float8CurrentScaling()
    # Releases before 2.9 have the old name alone, and later ones may drop it (TransformerEngine PR 2256).
    in_fp8 = te.autocast(recipe=recipe) if hasattr(te, "autocast") else te.fp8_autocast(True, fp8_recipe=recipe)
    with in_fp8:
        y = layer(x)
    y.backward(gradient)
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def provider() -> Any:
    """megatron-core's BackendSpecProvider of Transformer Engine modules."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
