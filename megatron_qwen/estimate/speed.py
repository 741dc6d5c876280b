"""Speed of a run before it starts, from the parts of its step."""

from dataclasses import dataclass

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import Hardware, known
from megatron_qwen.estimate.step_time import step_time


@dataclass(frozen=True)
class Speed:
    """What a run is expected to reach.

    Args:
        tokens_per_second: of all ranks together.
        step_s: seconds of an optimizer step at the full batch.
        bubble: fraction of a step in which pipeline ranks wait.
        achieved: assumed fraction of the device's peak rates.
    """

    tokens_per_second: float
    step_s: float
    bubble: float
    achieved: float

    def hours(self, config: RunConfig) -> float:
        """Hours of all steps; a batch ramp-up counts as if every step had the full batch."""
        return config.training.train_iters * self.step_s / 3600


def why_not(config: RunConfig, device: Hardware) -> str | None:
    """Why the speed of a precision on a device is not known, or None where it is."""
    precision = config.precision
    if precision.dtype != "bf16":
        return f"computes in {precision.dtype}, for which no rates are known; set precision.dtype=bf16."
    if precision.fp8 and precision.emulate_fp8:
        return "emulates FP8, for which there is no prediction; set precision.emulate_fp8=false."
    if precision.fp8 and device.fp8 is None:
        return f"computes in FP8, which the {device.name} does not support; set precision.fp8=null."
    if precision.fp8 == "mxfp8" and device.name != "b200":
        return f"uses the FP8 recipe mxfp8, which requires Blackwell, not {device.name}; set precision.fp8=tensorwise."
    return None


def expected_speed(config: RunConfig, *, gpu: str, world_size: int) -> Speed | None:
    """Speed on a kind of GPU; None where the GPU, or the precision on it, is not known.

    Args:
        config: a legal configuration.
        gpu: such as H100.
        world_size: ranks.
    """
    device = known(gpu)
    if device is None or why_not(config, device) is not None:
        return None
    assumptions = Assumptions()
    time = step_time(config, device=device, world_size=world_size, assumptions=assumptions)
    return Speed(time.tokens / time.seconds, time.seconds, time.bubble / time.seconds, assumptions.achieved)
