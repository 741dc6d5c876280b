"""What a run consists of on a rank."""

from dataclasses import dataclass

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import BatchSlice
from megatron_qwen.data.loaders.read_ahead import Loader
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.estimate.choices import Choice
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.build import Model
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.progress import TrainingProgress


@dataclass(frozen=True)
class TrainingComponents:
    """Everything a step needs; ``build.py`` makes it.

    Args:
        config: the run, with every choice of the preset made.
        asked: the run as it was asked for. Checkpoints keep this one: another machine may choose otherwise.
        choices: what the preset chose, and why.
        groups: process groups of this rank.
        backend: whose kernels compute.
        model: chunks of this rank.
        optimizer: sharded over data-parallel ranks.
        data: training and validation samples.
        loader: reads batches ahead.
        batch_slice: this rank's part of a batch.
        forward_step: what the schedule calls.
        progress: counters; the only part that changes by assignment, by the trainer and by a resume.
    """

    config: RunConfig
    asked: RunConfig
    choices: list[Choice]
    groups: ProcessGroupCollection
    backend: Backend
    model: Model
    optimizer: ChainedOptimizer
    data: TrainingData
    loader: Loader
    batch_slice: BatchSlice
    forward_step: ForwardStep
    progress: TrainingProgress
