"""The components of a run on one rank."""

from dataclasses import dataclass

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import BatchSlice
from megatron_qwen.data.loaders.read_ahead import Loader
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.estimate.choices import PresetChoice
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.build import Model
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.progress import TrainingProgress


@dataclass(frozen=True)
class TrainingComponents:
    """Everything a step needs; ``build.py`` builds it.

    Args:
        config: of the run, with all automatic choices filled in.
        asked: the configuration as the user gave it. Checkpoints keep this one: another machine may choose differently.
        choices: the automatic choices, and their reasons.
        groups: process groups of this rank.
        backend: te or torch.
        model: model chunks of this rank.
        optimizer: sharded over data-parallel ranks.
        data: training and validation samples.
        loader: prefetches batches.
        batch_slice: which part of a global batch this rank reads.
        forward_step: called by megatron-core's pipeline schedule.
        progress: counters; the only mutable component, changed by the trainer and by a resume.
    """

    config: RunConfig
    asked: RunConfig
    choices: list[PresetChoice]
    groups: ProcessGroupCollection
    backend: Backend
    model: Model
    optimizer: ChainedOptimizer
    data: TrainingData
    loader: Loader
    batch_slice: BatchSlice
    forward_step: ForwardStep
    progress: TrainingProgress
