"""The record of a step, which the trainer hands to its callbacks."""

from dataclasses import dataclass, field
from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.training.step import StepResult


@dataclass(frozen=True)
class StepRecord:
    """A step as the callbacks see it.

    Args:
        iteration: number of the step, from 1.
        result: loss, gradient norm, tokens, whether it was skipped.
        learning_rate: of this step.
        global_batch_size: sequences of this step.
        step_time_s: wall time, device work included.
        data_wait_s: the part of step_time_s spent waiting for batches.
        stage: name of the data stage.
        config: the configuration in force for the step.
        extra: further metrics, added by callbacks.
        communication_s: the part of step_time_s in which this rank waited for others; 0 on a GPU, where it is not
            known.
        queued_s: the part of step_time_s in which this rank was ready to run and had no core.
    """

    iteration: int
    result: StepResult
    learning_rate: float
    global_batch_size: int
    step_time_s: float
    data_wait_s: float
    stage: str
    config: RunConfig
    extra: dict[str, Any] = field(default_factory=dict)
    communication_s: float = 0.0
    queued_s: float = 0.0
