"""Chooses the backend, and says why."""

from dataclasses import dataclass
from typing import Any

from megatron_qwen.config.sections import PrecisionConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.models.te_backend import provider as te_backend


@dataclass(frozen=True)
class Backend:
    """A chosen backend.

    Args:
        name: ``te`` or ``torch``.
        reason: why, for the log.
        provider: megatron-core's BackendSpecProvider.
        self_attention: the class of the attention module around the provider's parts.
        fp8_provider: the same for the layers that emulate FP8; None where none does (the modules of Transformer Engine
            get their recipe from megatron-core, layer by layer).
    """

    name: str
    reason: str
    provider: Any
    self_attention: type
    fp8_provider: Any = None


def choose(precision: PrecisionConfig) -> Backend:
    """Picks the backend that was asked for, or the best that runs here.

    Raises:
        ConfigError: te or FP8 is requested where it cannot run; the message names what is missing.
    """
    if precision.emulate_fp8:
        missing: str | None = "precision.emulate_fp8=true"
    else:
        missing = te_backend.why_not() if precision.backend != "torch" else "precision.backend=torch"
    if precision.backend == "te" and missing:
        raise ConfigError(Problem("precision.backend", "te", f"cannot run here: {missing}. Use torch or auto."))
    if precision.fp8 and not precision.emulate_fp8:
        lacking = missing or te_backend.why_not_fp8(precision.fp8)
        if lacking:
            raise ConfigError(Problem("precision.fp8", precision.fp8, f"cannot run here: {lacking}. Set it to null."))
    if precision.use_precision_aware_optimizer and missing:
        fix = f"cannot run here: {missing}. Set it to false."
        raise ConfigError(Problem("precision.use_precision_aware_optimizer", "true", fix))
    if missing:
        from megatron_qwen.models.torch_backend.attention import TorchSelfAttention
        from megatron_qwen.models.torch_backend.provider import TorchSpecProvider

        emulated = TorchSpecProvider(precision.fp8) if precision.emulate_fp8 else None
        return Backend("torch", missing, TorchSpecProvider(), TorchSelfAttention, emulated)
    from megatron.core.transformer.attention import SelfAttention

    return Backend("te", "Transformer Engine and a CUDA device are available", te_backend.provider(), SelfAttention)
