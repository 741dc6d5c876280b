"""How a model is calibrated."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from checkpoints_convert.quantize.awq import AwqOptions
from checkpoints_convert.quantize.gptq import GptqOptions
from megatron_qwen.errors import ConfigError, Problem

Method = Literal["gptq", "awq", "smoothquant"]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model is calibrated. Only ``workers``, ``memory_bytes`` and ``stream`` leave the bytes as they are.

    Args:
        gptq: options of GPTQ.
        awq: options of AWQ.
        alpha: of SmoothQuant, how much of the inputs' range moves into the weights.
        dtype: in which layers are computed, fp32 or bf16.
        workers: threads on a CPU; None is one for every core.
        memory_bytes: memory for the residual stream and the Hessians; None is half of what is free.
        stream: where the residual stream is; ``auto`` puts it into memory if it takes at most a quarter of
            ``memory_bytes``.
        restart: discard the layers of an earlier start.
    """

    gptq: GptqOptions = field(default_factory=GptqOptions)
    awq: AwqOptions = field(default_factory=AwqOptions)
    alpha: float = 0.5
    dtype: Literal["fp32", "bf16"] = "fp32"
    workers: int | None = None
    memory_bytes: int | None = None
    stream: Literal["auto", "memory", "disk"] = "auto"
    restart: bool = False

    def of_method(self, method: Method) -> dict[str, Any]:
        """The options that determine what a method makes."""
        if method == "smoothquant":
            return {"alpha": self.alpha}
        return asdict(self.gptq if method == "gptq" else self.awq)

    def check(self) -> None:
        """Raises ConfigError with everything that is out of range."""
        rules = (
            ("damping", self.gptq.damping, 0 < self.gptq.damping <= 1, "must be above 0 and at most 1"),
            ("exponents", self.awq.exponents, self.awq.exponents >= 1, "must be at least 1"),
            ("clip_steps", self.awq.clip_steps, self.awq.clip_steps >= 2, "must be at least 2"),
            ("alpha", self.alpha, 0 <= self.alpha <= 1, "must be between 0 and 1"),
            ("workers", self.workers, self.workers is None or self.workers >= 1, "must be at least 1"),
        )
        problems = [Problem(name, value, f"{rule}.") for name, value, holds, rule in rules if not holds]
        if problems:
            raise ConfigError(problems)
