"""Speed of a run before it starts: a stated share of the device's peak, less the pipeline's bubble."""

from dataclasses import dataclass

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.peaks import peak_tflops

# Not measured here. Dense: Llama 3 405B on H100 in bf16 reached 38 to 43 % (arXiv 2407.21783, table 4), Megatron-LM's
# README says up to 47 %. Mixtures: Qwen3-30B-A3B on 16 H100 reached 20 % with natural and 30 % with balanced routing
# (Megatron-Bridge, model card and hardware configurations).
ASSUMED_MFU, ASSUMED_MFU_MOE = 0.40, 0.25


@dataclass(frozen=True)
class Speed:
    """What a run is expected to reach.

    Args:
        tokens_per_second: of all ranks.
        step_s: one optimizer step at the full batch.
        bubble: share of a step that pipeline ranks wait.
    """

    tokens_per_second: float
    step_s: float
    bubble: float

    def hours(self, config: RunConfig) -> float:
        """Duration of all steps; a ramp of the batch is taken at its full size."""
        return config.training.train_iters * self.step_s / 3600


def expected_speed(config: RunConfig, *, gpu: str, world_size: int) -> Speed | None:
    """Speed on a kind of GPU; None where its peak is not known.

    Args:
        config: a legal configuration.
        gpu: such as H100.
        world_size: ranks.
    """
    peak = peak_tflops(gpu, config.precision.dtype)
    if peak is None:
        return None
    training, parallel = config.training, config.parallel
    step = training.micro_batch_size * max(1, world_size // parallel.model_parallel_size)
    micro_batches = max(1, training.global_batch_size // step)
    waiting = (parallel.pipeline_model_parallel_size - 1) / parallel.virtual_stages
    bubble = waiting / (micro_batches + waiting)
    # Full recompute does the forward pass once more: four thirds of the work, of which three count.
    recompute = 0.75 if training.recompute_granularity == "full" else 1.0
    flops = training_flops_per_token(config.model, config.data.seq_length)
    share = ASSUMED_MFU_MOE if config.model.is_moe else ASSUMED_MFU
    per_second = world_size * peak * 1e12 * share * (1 - bubble) * recompute / flops
    tokens = training.global_batch_size * config.data.seq_length
    return Speed(per_second, tokens / per_second, bubble)
