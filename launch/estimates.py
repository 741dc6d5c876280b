"""What a run is predicted to need and to reach on a cluster, from the torch-free estimates."""

from dataclasses import dataclass

from launch.request import Request
from megatron_qwen.estimate.memory import StageMemory, checkpoint_bytes, memory_per_stage
from megatron_qwen.estimate.parameters import ParameterCount, count_parameters
from megatron_qwen.estimate.peaks import device_memory_gib
from megatron_qwen.estimate.speed import Speed, expected_speed


@dataclass(frozen=True)
class Prediction:
    """Figures of a run.

    Args:
        parameters: of the model.
        memory: of a rank of the fullest pipeline stage.
        device_gib: memory of the cluster's GPU, None where it is not known.
        speed: None where the GPU's peak is not known.
        checkpoint: bytes of one checkpoint.
        tokens: of the whole run.
        hours: of the whole run, None without a speed.
        gpu_hours: of the whole run, None without a speed.
    """

    parameters: ParameterCount
    memory: StageMemory
    device_gib: float | None
    speed: Speed | None
    checkpoint: float
    tokens: int
    hours: float | None
    gpu_hours: float | None


def predict(request: Request) -> Prediction:
    """The figures; the configuration must be legal."""
    config, world = request.config, request.world_size
    count = count_parameters(config.model)
    stages = memory_per_stage(config, world_size=world)
    speed = expected_speed(config, gpu=request.cluster.gpu, world_size=world) if request.cluster.gpu else None
    hours = speed.hours(config) if speed else None
    training = config.training
    return Prediction(
        parameters=count,
        memory=max(stages, key=lambda stage: stage.total_gib),
        device_gib=device_memory_gib(request.cluster.gpu) if request.cluster.gpu else None,
        speed=speed,
        checkpoint=checkpoint_bytes(config, parameters=count.total),
        tokens=training.train_iters * training.global_batch_size * config.data.seq_length,
        hours=hours,
        gpu_hours=None if hours is None else hours * world,
    )
