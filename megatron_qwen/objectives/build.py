"""The objective of a run."""

from collections.abc import Callable, Sequence

from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.config.run import RunConfig
from megatron_qwen.objectives.base import Objective
from megatron_qwen.objectives.dpo import Dpo
from megatron_qwen.objectives.orpo import Orpo
from megatron_qwen.objectives.pretrain import Pretrain
from megatron_qwen.objectives.sft import Sft

# Each gets the section, for its settings, and of its data the ids that end an answer and the unit of weights.
_KINDS: dict[str, Callable[[ObjectiveConfig, Sequence[int], int], Objective]] = {
    "pretrain": lambda _settings, _ends, unit: Pretrain(unit),
    "sft": Sft,
    "dpo": Dpo,
    "orpo": Orpo,
}


def build_objective(config: RunConfig, *, ends_of_turn: Sequence[int] = (), loss_unit: int = 1) -> Objective:
    """The objective that objective.kind names.

    Args:
        config: the run.
        ends_of_turn: ids that end an answer in its data.
        loss_unit: weights of tokens in its data are multiples of 1 / loss_unit.
    """
    return _KINDS[config.objective.kind](config.objective, ends_of_turn, loss_unit)
