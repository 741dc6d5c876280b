"""The objective of a run."""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.objectives.base import Objective
from megatron_qwen.objectives.pretrain import Pretrain

_KINDS = {"pretrain": Pretrain}


def build_objective(config: RunConfig) -> Objective:
    """The objective that objective.kind names."""
    return _KINDS[config.objective.kind]()
