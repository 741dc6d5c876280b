"""The objective of a run."""

from collections.abc import Callable

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ObjectiveConfig
from megatron_qwen.objectives.base import Objective
from megatron_qwen.objectives.pretrain import Pretrain
from megatron_qwen.objectives.sft import Sft

# Each gets the section, for its settings.
_KINDS: dict[str, Callable[[ObjectiveConfig], Objective]] = {"pretrain": lambda _settings: Pretrain(), "sft": Sft}


def build_objective(config: RunConfig) -> Objective:
    """The objective that objective.kind names."""
    return _KINDS[config.objective.kind](config.objective)
