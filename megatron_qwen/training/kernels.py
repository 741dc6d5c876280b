"""Starts the compiled kernels of a run, on all ranks or on none."""

import torch.distributed as dist

from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.choices import PresetChoice
from megatron_qwen.models.torch_backend.compiled import Kernels, compiler_failure
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS


def start_kernels(config: RunConfig, choices: list[PresetChoice]) -> tuple[RunConfig, list[PresetChoice]]:
    """Compiles the memory-bound operations on all ranks or on none: compiled and eager kernels round differently.

    Args:
        config: the run, with every choice of the preset made.
        choices: those choices.

    Returns:
        Both, without kernels where a rank's compiler does not work.

    Raises:
        ConfigError: a compiler does not work, and the user set performance.compile=true.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    if config.performance.compile:
        dist.all_gather_object(reasons, compiler_failure())
    broken = next(((rank, reason) for rank, reason in enumerate(reasons) if reason is not None), None)
    if broken is not None:
        reason = "torch.compile does not work on rank {}: {}".format(*broken)
        field = "performance.compile"
        if any(choice.forced for choice in choices if choice.field == field):
            fix = f"{reason}. Install g++ on that machine, or set performance.compile=false."
            raise ConfigError(Problem(field, "true", fix))
        config = config.with_section("performance", compile=False)
        off = PresetChoice(field, False, reason)
        choices = [off if choice.field == field else choice for choice in choices]
    PROCESS_KERNELS.use(Kernels() if config.performance.compile else None)
    return config, choices
