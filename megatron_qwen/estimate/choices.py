"""What ``performance.preset`` turns on: each choice with its reason, before anything is built.

A field that is null is chosen here; a field that is set keeps its value. The same rules serve a run (for the machine
that it starts on) and ``mq launch dry-run`` (for the machine that the cluster file describes).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_qwen.config.blend import stage_configs
from megatron_qwen.config.lora import targets
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import TrainingConfig
from megatron_qwen.errors import Problem
from megatron_qwen.estimate.adapters import adapts_experts
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.estimate.memory import memory_per_stage

_COLLECTION_INTERVAL = 100  # steps; chosen by hand
# FLOPs per CPU thread from which torch.compile pays off, about twenty minutes of work: kernels took up to 17 s to
# compile and saved 1 to 3 % of a step in bf16, more in fp32.
_COMPILE_FROM_FLOP = 1e14
_ValueAndReason = tuple[Any, str]
_ChoiceRule = Callable[[RunConfig, Machine, int], _ValueAndReason]


@dataclass(frozen=True)
class PresetChoice:
    """One field that the preset may choose, and its value in the run.

    Args:
        field: ``section.name``.
        value: its value in the run.
        reason: why.
        forced: whether the configuration set it, not the preset.
    """

    field: str
    value: Any
    reason: str
    forced: bool = False

    def __str__(self) -> str:
        """The line of the log: ``parallel.overlap_grad_reduce=false: reason``."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.field}={value}: {self.reason}"


def choose(config: RunConfig, machine: Machine, *, world_size: int) -> tuple[RunConfig, list[PresetChoice]]:
    """Fills in what the configuration leaves to the preset.

    Args:
        config: a legal configuration.
        machine: what the run will compute on.
        world_size: number of ranks.

    Returns:
        The configuration with every such field set, and the choices in the order in which they were made.
    """
    made = []
    for path, (off, rule) in _RULES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None:
            made.append(PresetChoice(path, value, "set in the configuration", forced=True))
            continue
        if config.performance.preset == "none":
            value, reason = off, "performance.preset=none"
        else:
            value, reason = rule(config, machine, world_size)
        config = config.with_section(section, **{name: value})
        made.append(PresetChoice(path, value, reason))
        if path == "training.recompute_granularity" and value == "selective":
            config = config.with_section("training", recompute_modules=heavy_modules(config))
    return config, made


def impossible(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Problems of fields that are set to what this machine, backend or model does not support."""
    performance, te = config.performance, machine.backend == "te"
    asked = {
        "fused_kernels": performance.fused_kernels,
        "tp_comm_overlap": performance.tp_comm_overlap,
        "cuda_graph_impl": performance.cuda_graph_impl not in (None, "none"),
        "fp8_param_gather": performance.fp8_param_gather,
        "cpu_offloading_num_layers": performance.cpu_offloading_num_layers,
        "optimizer_offload_fraction": performance.optimizer_offload_fraction,
    }
    for name, wanted in asked.items():
        if wanted and not te:
            fix = "requires Transformer Engine on a GPU (precision.backend=te); set it to null."
            yield Problem(f"performance.{name}", getattr(performance, name), fix)
    if performance.compile and te:
        yield Problem(
            "performance.compile",
            "true",
            "requires the torch backend (Transformer Engine has fused kernels); set it to null.",
        )
    if performance.moe_grouped_gemm and config.precision.emulate_fp8:
        fix = "cannot be combined with precision.emulate_fp8, which computes experts one by one; set it to null."
        yield Problem("performance.moe_grouped_gemm", "true", fix)
    if performance.moe_grouped_gemm and te and adapts_experts(config):
        fix = "is one module for all experts in the te backend, which no adapter can be put beside; set it to null."
        yield Problem("performance.moe_grouped_gemm", "true", fix)
    if performance.fp8_param_gather and te and config.precision.fp8 is None:
        yield Problem(
            "performance.fp8_param_gather",
            "true",
            "requires precision.fp8; set precision.fp8, or set this field to null.",
        )
    if performance.fp8_param_gather and config.precision.use_precision_aware_optimizer:
        fix = (
            "cannot be combined with precision.use_precision_aware_optimizer, whose remainders complete bf16 weights; "
            "set one of them to null."
        )
        yield Problem("performance.fp8_param_gather", "true", fix)
    if performance.optimizer_offload_fraction and te:
        yield from _offload_problems(config)
    if performance.cpu_offloading_num_layers and config.parallel.pipeline_model_parallel_size > 1:
        fix = "requires parallel.pipeline_model_parallel_size=1; set it to null."
        yield Problem("performance.cpu_offloading_num_layers", performance.cpu_offloading_num_layers, fix)
    dispatcher = performance.moe_token_dispatcher
    if dispatcher in ("deepep", "hybridep") and not (machine.gpu and "deep_ep" in machine.libraries):
        fix = "requires a GPU and the package deep_ep, which cannot be imported here; set it to null."
        yield Problem("performance.moe_token_dispatcher", dispatcher, fix)


def _offload_problems(config: RunConfig) -> Iterator[Problem]:
    """What megatron-core's optimizer offload does not support: it needs bf16 weights and complete fp32 state."""
    precision = config.precision
    if precision.dtype != "bf16":
        fix = (
            "must be bf16 for performance.optimizer_offload_fraction; set it to bf16, or the offload fraction to null."
        )
        yield Problem("precision.dtype", precision.dtype, fix)
    if precision.use_precision_aware_optimizer:
        fix = "cannot be combined with performance.optimizer_offload_fraction; set one of them to null."
        yield Problem("precision.use_precision_aware_optimizer", "true", fix)
    if config.performance.fp8_param_gather:
        fix = "cannot be combined with performance.optimizer_offload_fraction; set one of them to null."
        yield Problem("performance.fp8_param_gather", "true", fix)


def overlaps(config: RunConfig, world_size: int) -> _ValueAndReason:
    """Whether data-parallel communication can be overlapped with compute on GPUs, and why."""
    parallel = config.parallel
    peers = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if peers <= 1:
        return False, "no data parallelism: no other rank holds the same weights"
    return True, f"{peers} data-parallel ranks reduce the gradients of each weight"


def _grad_reduce(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if not machine.gpu:
        return False, "no overlap of communication with compute on a CPU"
    return overlaps(config, world_size)


def _param_gather(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if not config.parallel.overlap_grad_reduce:
        return False, "requires parallel.overlap_grad_reduce"
    return True, "the weights of each bucket are gathered before the layer that needs them"


def _fused(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if machine.backend == "te":
        return True, "Transformer Engine has these kernels"
    return False, "the torch backend has its own operations (models/torch_backend/functions.py)"


def _compile(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if machine.backend == "te":
        return False, "Transformer Engine has fused kernels"
    if machine.gpu:
        return False, "not measured on a GPU by this project; set it to true to try"
    if not machine.compiler:
        return False, "no C++ compiler (g++) was found"
    tokens = config.training.train_iters * config.training.global_batch_size * config.data.seq_length
    work = (
        training_flops_per_token(config.model, config.data.seq_length, config.lora)
        * tokens
        / (world_size * machine.threads)
    )
    if work < _COMPILE_FROM_FLOP:
        return (
            False,
            f"the run is too short for compilation to pay off: {work:.1e} of {_COMPILE_FROM_FLOP:.0e} FLOPs per thread",
        )
    return True, "memory-bound operations become one kernel each"


def _precision_aware_optimizer(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if machine.backend != "te" or config.precision.dtype != "bf16":
        return False, "requires Transformer Engine's Adam and bf16"
    if config.performance.optimizer_offload_fraction:
        return False, "not supported with the optimizer on the host"
    if config.performance.fp8_param_gather:
        return False, "not supported with FP8 weights (performance.fp8_param_gather)"
    if machine.memory_gib is None:
        return False, "the memory of the device is not known"
    need = _need(config, machine, world_size)
    if need <= machine.memory_gib:
        return False, f"not needed: {need:.0f} of {machine.memory_gib:.0f} GiB"
    reduced = _need(config.with_section("precision", use_precision_aware_optimizer=True), machine, world_size)
    return True, f"an estimated {need:.0f} GiB of {machine.memory_gib:.0f} without it, {reduced:.0f} with it"


def _recompute(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if machine.memory_gib is None:
        return (
            "none",
            "the memory of the device is not known" if machine.gpu else "CPU ranks share the memory of the host",
        )
    if config.performance.cpu_offloading_num_layers:
        return "none", "megatron-core does not combine recompute with performance.cpu_offloading_num_layers"
    need = _need(config, machine, world_size)
    if need <= machine.memory_gib:
        return "none", f"fits: an estimated {need:.0f} of {machine.memory_gib:.0f} GiB"
    modules = heavy_modules(config)
    changes = {"recompute_granularity": "selective", "recompute_modules": modules}
    selective = _need(config.with_section("training", **changes), machine, world_size)
    without = f"an estimated {need:.0f} GiB of {machine.memory_gib:.0f} without"
    if selective <= machine.memory_gib:
        return "selective", f"{without}, {selective:.0f} with {', '.join(modules)} recomputed"
    if config.performance.cuda_graph_impl == "local":
        return (
            "selective",
            f"{without}, {selective:.0f} with {', '.join(modules)} recomputed; CUDA graphs exclude full recompute",
        )
    full = _need(config.with_section("training", recompute_granularity="full"), machine, world_size)
    verdict = "" if full <= machine.memory_gib else "; full recompute does not fit either"
    return "full", f"{without}, {selective:.0f} with selective recompute, {full:.0f} with full recompute{verdict}"


def heavy_modules(config: RunConfig) -> tuple[str, ...]:
    """Modules for selective recompute: the MLP or the experts, which keep most activations.

    Not core_attn, since fused attention stores no scores. A list that the configuration sets is kept.
    """
    if config.training.recompute_modules != TrainingConfig().recompute_modules:
        return config.training.recompute_modules
    return ("moe",) if config.model.is_moe else ("mlp",)


def _need(config: RunConfig, machine: Machine, world_size: int) -> float:
    """GiB of the fullest rank, in the data stage of the run that needs most."""
    return max(
        stage.total_gib
        for stage_config in stage_configs(config)
        for stage in memory_per_stage(stage_config, world_size=world_size, backend=machine.backend, gpu=machine.gpu)
    )


def _tensor_overlap(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if config.parallel.tensor_model_parallel_size == 1:
        return False, "no tensor parallelism"
    if machine.backend != "te" or not config.parallel.sequence_parallel:
        return False, "requires the te backend and sequence parallelism"
    return False, "not measured by this project; set it to true to use Transformer Engine's buffers"


def _dispatcher(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if not config.model.is_moe:
        return "alltoall", "a dense model"
    if config.parallel.expert_model_parallel_size == 1:
        return "alltoall", "expert-parallel size 1: every rank holds all experts"
    if machine.gpu and "deep_ep" in machine.libraries:
        return "deepep", "the package deep_ep is installed"
    return "alltoall", "the package deep_ep was not found" if machine.gpu else "deep_ep has no CPU kernels"


def _shared_expert(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if config.model.moe_shared_expert_intermediate_size is None:
        return False, "no shared expert"
    if not machine.gpu:
        return False, "no overlap of communication with compute on a CPU"
    if any(".shared_expert." in target.name for target in targets(config.lora, config.model)):
        return False, "calls the shared expert in pieces, past its adapters"
    if config.parallel.expert_model_parallel_size == 1:
        return False, "expert-parallel size 1: no all-to-all to overlap with"
    if config.performance.moe_token_dispatcher == "allgather":
        return False, "the allgather dispatcher does not support it"
    if config.training.recompute_granularity == "selective" and "shared_experts" in config.training.recompute_modules:
        return False, "not supported with recompute of the shared expert"
    return True, "the shared expert computes during the all-to-all"


def _grouped(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if not config.model.is_moe:
        return False, "a dense model"
    if machine.backend == "te" and adapts_experts(config):
        return False, "Transformer Engine's grouped experts are one module, which no adapter can be put beside"
    if machine.backend == "te":
        return True, "Transformer Engine's grouped GEMM"
    if config.precision.emulate_fp8:
        return False, "emulated FP8 computes experts one by one"
    return True, "one operation for all experts of a rank (models/torch_backend/experts.py)"


def _graphs(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if machine.backend != "te":
        return "none", "requires the te backend"
    return "none", "not measured by this project; try local where kernel launches limit speed (small models)"


def _fp8_gather(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if config.precision.fp8 is None:
        return False, "no FP8"
    if machine.backend != "te":
        return False, "emulated FP8 keeps its weights in precision.dtype"
    return False, "not measured by this project; halves the bytes of the parameter all-gather"


def _layer_offload(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    return 0, "recompute is preferred: host-device transfer is slower than computing again"


def _optimizer_offload(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    return 0.0, "more ranks or the precision-aware optimizer are preferred"


def _collections(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if world_size == 1:
        return 0, "a single rank delays no other with its garbage collection"
    return (_COLLECTION_INTERVAL, "all ranks collect at the same step, so none waits for another")


def _async_save(config: RunConfig, machine: Machine, world_size: int) -> _ValueAndReason:
    if not machine.gpu:
        # 0.44 s of a step against 0.46 s that it waited (benchmarks/results/cpu_checkpoint.json).
        return False, "on a CPU the thread that writes takes as much of a step as training would wait"
    return True, "a thread of the host writes while the GPU computes"


# Field -> (value that turns it off, rule). The order matters: a rule sees what earlier rules chose.
_RULES: dict[str, tuple[Any, _ChoiceRule]] = {
    "performance.fused_kernels": (False, _fused),
    "performance.compile": (False, _compile),
    "parallel.overlap_grad_reduce": (False, _grad_reduce),
    "parallel.overlap_param_gather": (False, _param_gather),
    "performance.moe_grouped_gemm": (False, _grouped),
    "precision.use_precision_aware_optimizer": (False, _precision_aware_optimizer),
    "training.recompute_granularity": ("none", _recompute),
    "performance.tp_comm_overlap": (False, _tensor_overlap),
    "performance.moe_token_dispatcher": ("alltoall", _dispatcher),
    "performance.moe_shared_expert_overlap": (False, _shared_expert),
    "performance.cuda_graph_impl": ("none", _graphs),
    "performance.fp8_param_gather": (False, _fp8_gather),
    "performance.cpu_offloading_num_layers": (0, _layer_offload),
    "performance.optimizer_offload_fraction": (0.0, _optimizer_offload),
    "performance.garbage_collection_interval": (0, _collections),
    "checkpoint.async_save": (False, _async_save),
}
