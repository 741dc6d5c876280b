"""Makes the writers of a run's metrics."""

import torch.distributed as dist

from megatron_qwen.config.run import RunConfig, as_dict
from megatron_qwen.metrics.wandb_writer import WandbWriter
from megatron_qwen.metrics.writers import JsonlWriter, MetricsWriter, TensorBoardWriter
from megatron_qwen.rundir import RunDirectory


def build_writers(config: RunConfig, directory: RunDirectory, resumed_at: int) -> list[MetricsWriter]:
    """Writers of rank 0; none on other ranks: losses and norms are the same on all.

    Args:
        config: of the run.
        directory: of the run.
        resumed_at: iteration that training resumes from; what earlier attempts wrote beyond it is set aside.
    """
    if dist.get_rank() != 0:
        return []
    writers: list[MetricsWriter] = [JsonlWriter(directory.metrics, resumed_at=resumed_at)]
    if config.metrics.tensorboard:
        writers.append(TensorBoardWriter(directory.tensorboard, resumed_at=resumed_at))
    if config.metrics.wandb_project is not None:
        writers.append(WandbWriter(config.metrics.wandb_project, run_dir=directory.path, config=as_dict(config)))
    return writers
