"""Layouts of a model on a number of devices: memory and speed of each, or why it is impossible.

Tensor, context and expert sizes are powers of two; pipeline sizes are all that divide the layers, and powers of two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_qwen.config.checks import problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.choices import heavy_modules
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.memory import StageMemory, memory_per_stage
from megatron_qwen.estimate.step_time import StepTime, step_time

# What is tried. Sizes of virtual pipelines must divide the layers of a rank, which have the factors 2, 3, 5 and 7 in
# the family (24, 28, 36, 48, 64 and 80 layers). Bounds chosen by hand.
_MICRO_BATCHES, _VIRTUAL = (1, 2, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8, 10)
_LONGEST_PIPELINE = 32
# With a shorter part of the sequence, a context-parallel rank spends its time on communication.
_MIN_TOKENS_PER_RANK = 2048


@dataclass(frozen=True)
class LayoutEstimate:
    """A layout that fits, with its estimated memory and step time.

    Args:
        config: the recipe with it.
        memory: of a rank of every pipeline stage.
        time: of a step.
        world_size: devices.
        mfu: model FLOP/s as a share of the bf16 peak.
    """

    config: RunConfig
    memory: list[StageMemory]
    time: StepTime
    world_size: int
    mfu: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one device."""
        return self.time.tokens / self.time.seconds / self.world_size

    @property
    def memory_gib(self) -> float:
        """GiB of a rank of the fullest stage."""
        return max(stage.total_gib for stage in self.memory)

    @property
    def bubble(self) -> float:
        """Share of a step in which a rank waits for the pipeline."""
        return self.time.bubble / self.time.seconds


@dataclass(frozen=True)
class RejectedLayout:
    """A layout that is illegal or does not fit.

    Args:
        config: the recipe with it.
        reason: why.
        need_gib: GiB of the fullest rank of a legal layout that does not fit; None where it is illegal.
    """

    config: RunConfig
    reason: str
    need_gib: float | None = None


def layouts(
    config: RunConfig, *, world_size: int, device: Hardware, assumptions: Assumptions | None = None
) -> tuple[list[LayoutEstimate], list[RejectedLayout]]:
    """All layouts that fit, the fastest first, and all that are rejected.

    Args:
        config: the recipe; its model, data, precision and global batch are kept.
        world_size: devices.
        device: their kind.
        assumptions: of the prediction.
    """
    found: list[LayoutEstimate] = []
    rejected: list[RejectedLayout] = []
    for bare in _shapes(config, world_size, device):
        shape = bare.with_section("training", micro_batch_size=1)
        if reason := _illegal(shape, world_size):
            rejected.append(RejectedLayout(shape, reason))
            continue
        for micro in _MICRO_BATCHES:
            sized = shape.with_section("training", micro_batch_size=micro)
            if micro > 1 and (reason := _illegal(sized, world_size)):
                rejected.append(RejectedLayout(sized, reason))
                continue
            for recompute in ("none", "selective", "full"):
                whole = {"recompute_method": "uniform", "recompute_num_layers": 1}
                one = sized.with_section("training", recompute_granularity=recompute, **whole)
                if recompute == "selective":
                    one = one.with_section("training", recompute_modules=heavy_modules(one))
                answer = _judge(one, world_size, device, assumptions)
                (found if isinstance(answer, LayoutEstimate) else rejected).append(answer)  # type: ignore[arg-type]
    found.sort(key=lambda candidate: candidate.tokens_per_second, reverse=True)
    return found, rejected


def _shapes(config: RunConfig, world_size: int, device: Hardware) -> Iterator[RunConfig]:
    """Tensor, pipeline, context and expert sizes; legal or not."""
    model, seq = config.model, config.data.seq_length
    contexts = [size for size in _powers(world_size) if size == 1 or seq // size >= _MIN_TOKENS_PER_RANK]
    experts = _powers(min(model.num_moe_experts or 1, world_size))
    for tp in _powers(min(device.devices_per_node, world_size)):
        for pp in _pipelines(model.num_layers, world_size // tp):
            for virtual in _VIRTUAL if pp > 1 else (1,):
                if virtual > 1 and model.num_layers % (pp * virtual):
                    continue  # skipped silently: the plain pipeline of this size reports an uneven split
                for cp in contexts:
                    for ep in experts:
                        alone = world_size // (tp * pp) <= 1
                        yield config.with_section("parallel", **_sizes(tp, pp, virtual, cp, ep, alone=alone))


def _pipelines(layers: int, ranks: int) -> list[int]:
    """Pipeline sizes up to the longest that is tried."""
    limit = min(_LONGEST_PIPELINE, layers, ranks)
    return sorted({*_powers(limit), *(size for size in range(1, limit + 1) if layers % size == 0)})


def _sizes(tp: int, pp: int, virtual: int, cp: int, ep: int, *, alone: bool) -> dict[str, Any]:
    return {
        # As the preset chooses (choices.py) where nothing is forced.
        "overlap_grad_reduce": not alone,
        "overlap_param_gather": not alone,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1 if ep > 1 else None,
    }


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to a limit."""
    return [1 << number for number in range(max(1, limit).bit_length())]


def _illegal(config: RunConfig, world_size: int) -> str | None:
    """Why a layout is illegal by the rules of ``config/checks.py``; None where it is legal."""
    packs = config.objective.kind != "pretrain" and config.precision.backend != "torch"
    if packs and config.parallel.context_parallel_size > 1:
        return "packed rows cannot be split over context-parallel ranks in the te backend (precision.backend=torch can)"
    return " ".join(map(str, problems(config, world_size=world_size))) or None


def _memory(config: RunConfig, world_size: int) -> tuple[list[StageMemory], float]:
    """Memory of every stage, and GiB of the fullest."""
    memory = memory_per_stage(config, world_size=world_size)
    return memory, max(stage.total_gib for stage in memory)


def _judge(
    config: RunConfig, world_size: int, device: Hardware, assumptions: Assumptions | None
) -> LayoutEstimate | RejectedLayout:
    """Estimates a layout with plain optimizer state; with the precision-aware optimizer where only that fits.

    This is the order in which the preset of a run chooses (``choices.py``).
    """
    asked = config.precision.use_precision_aware_optimizer
    one = config.with_section("precision", use_precision_aware_optimizer=bool(asked))
    memory, need = _memory(one, world_size)
    may = asked is None and config.precision.dtype == "bf16" and config.precision.backend != "torch"
    may = may and not config.performance.optimizer_offload_fraction
    if need > device.memory_gib and may:
        one = config.with_section("precision", use_precision_aware_optimizer=True)
        memory, need = _memory(one, world_size)
    config = one
    if need > device.memory_gib:
        return RejectedLayout(config, f"needs {need:.0f} GiB of {device.memory_gib:.0f}.", need)
    time = step_time(config, device=device, world_size=world_size, assumptions=assumptions)
    flops = (
        training_flops_per_token(config.model, config.data.seq_length, config.lora)
        * time.tokens
        / time.seconds
        / world_size
    )
    return LayoutEstimate(config, memory, time, world_size, flops / (device.peak_tflops * 1e12))
