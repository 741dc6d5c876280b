"""What a run is predicted to need and to reach on a cluster, from the torch-free estimates."""

from dataclasses import dataclass

from launch.request import SubmitRequest
from megatron_qwen.config import blend
from megatron_qwen.estimate.choices import PresetChoice, choose
from megatron_qwen.estimate.hardware import known
from megatron_qwen.estimate.machine import expected
from megatron_qwen.estimate.memory import StageMemory, checkpoint_bytes, memory_per_stage
from megatron_qwen.estimate.parameters import ParameterCount, count_parameters
from megatron_qwen.estimate.speed import Speed, expected_speed


@dataclass(frozen=True)
class RunPrediction:
    """Figures of a run.

    Args:
        parameters: of the model.
        memory: of a rank of the fullest pipeline stage.
        device_gib: memory of the cluster's GPU, None where it is not known.
        speed: in the first stage; None where the GPU's peak is not known.
        checkpoint: bytes of one checkpoint.
        tokens: of the whole run.
        hours: of the whole run, None without a speed.
        gpu_hours: of the whole run, None without a speed.
        choices: what performance.preset will turn on, and why.
    """

    parameters: ParameterCount
    memory: StageMemory
    device_gib: float | None
    speed: Speed | None
    checkpoint: float
    tokens: int
    hours: float | None
    gpu_hours: float | None
    choices: list[PresetChoice]


def predict(request: SubmitRequest) -> RunPrediction:
    """The figures over all stages of the run; the configuration must be legal."""
    world, gpu = request.world_size, request.cluster.gpu
    machine = expected(request.config, gpu=gpu)
    config, choices = choose(request.config, machine, world_size=world)
    count = count_parameters(config.model)
    stage_configs = blend.stage_configs(config)
    memory = [
        stage
        for one in stage_configs
        for stage in memory_per_stage(one, world_size=world, backend=machine.backend, gpu=machine.gpu)
    ]
    device = known(gpu) if gpu else None
    speeds = [expected_speed(one, gpu=gpu, world_size=world) if gpu else None for one in stage_configs]
    each = [speed.hours(one) for speed, one in zip(speeds, stage_configs, strict=True) if speed is not None]
    hours = sum(each) if len(each) == len(stage_configs) else None
    return RunPrediction(
        parameters=count,
        memory=max(memory, key=lambda stage: stage.total_gib),
        device_gib=device.memory_gib if device is not None else None,
        speed=speeds[0],
        checkpoint=checkpoint_bytes(config, parameters=count.total),
        tokens=sum(
            one.training.train_iters * one.training.global_batch_size * one.data.seq_length for one in stage_configs
        ),
        hours=hours,
        gpu_hours=None if hours is None else hours * world,
        choices=choices,
    )
