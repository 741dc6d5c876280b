"""What ``performance.preset`` turns on: each choice with its reason, before anything is built.

A field that is null is chosen here; one that is set was decided by a person and is kept. The same rules serve the run
(on the machine it finds) and ``mq launch dry-run`` (on the cluster's).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_qwen.config.blend import stage_configs
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import TrainingConfig
from megatron_qwen.errors import Problem
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.estimate.memory import memory_per_stage

_COLLECTION_INTERVAL = 100
# Of a CPU thread, some twenty minutes: kernels took up to 17 s to compile and saved 1 to 3 % of a step in bf16, and
# more in fp32.
_COMPILE_FROM_FLOP = 1e14
_Answer = tuple[Any, str]
_Rule = Callable[[RunConfig, Machine, int], _Answer]


@dataclass(frozen=True)
class Choice:
    """One decision.

    Args:
        field: ``section.name``.
        value: what holds in the run.
        reason: why.
        forced: whether a person has said so.
    """

    field: str
    value: Any
    reason: str
    forced: bool = False

    def __str__(self) -> str:
        """As the log has it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.field}={value}: {self.reason}"


def choose(config: RunConfig, machine: Machine, *, world_size: int) -> tuple[RunConfig, list[Choice]]:
    """Fills in what the configuration leaves to the preset.

    Args:
        config: a legal configuration.
        machine: what the run will compute on.
        world_size: its ranks.

    Returns:
        The configuration with every such field set, and the choices in the order in which they were made.
    """
    made = []
    for path, (off, rule) in _RULES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None:
            made.append(Choice(path, value, "set in the configuration", forced=True))
            continue
        if config.performance.preset == "none":
            value, reason = off, "performance.preset=none"
        else:
            value, reason = rule(config, machine, world_size)
        config = config.with_section(section, **{name: value})
        made.append(Choice(path, value, reason))
        if path == "training.recompute_granularity" and value == "selective":
            config = config.with_section("training", recompute_modules=heavy_modules(config))
    return config, made


def impossible(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What was asked for that this machine, backend or model cannot do."""
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
            fix = "needs Transformer Engine on a GPU (precision.backend=te); set it to null."
            yield Problem(f"performance.{name}", getattr(performance, name), fix)
    if performance.compile and te:
        yield Problem("performance.compile", "true", "is for the torch backend's operations; set it to null.")
    if performance.moe_grouped_gemm and config.precision.emulate_fp8:
        fix = "goes not with precision.emulate_fp8, whose experts compute one by one; set it to null."
        yield Problem("performance.moe_grouped_gemm", "true", fix)
    if performance.fp8_param_gather and te and config.precision.fp8 is None:
        yield Problem("performance.fp8_param_gather", "true", "needs precision.fp8; set that, or this to null.")
    if performance.fp8_param_gather and config.precision.use_precision_aware_optimizer:
        fix = "goes not with precision.use_precision_aware_optimizer, which completes bf16 weights; set one to null."
        yield Problem("performance.fp8_param_gather", "true", fix)
    if performance.optimizer_offload_fraction and te:
        yield from _unfit_for_the_host(config)
    if performance.cpu_offloading_num_layers and config.parallel.pipeline_model_parallel_size > 1:
        fix = "goes with a single pipeline stage only; set it to null."
        yield Problem("performance.cpu_offloading_num_layers", performance.cpu_offloading_num_layers, fix)
    dispatcher = performance.moe_token_dispatcher
    if dispatcher in ("deepep", "hybridep") and not (machine.gpu and "deep_ep" in machine.libraries):
        fix = "needs a GPU and the package deep_ep, which does not import here; set it to null."
        yield Problem("performance.moe_token_dispatcher", dispatcher, fix)


def _unfit_for_the_host(config: RunConfig) -> Iterator[Problem]:
    """What megatron-core's optimizer on the host has not: its state is whole and in fp32, beside weights in bf16."""
    precision = config.precision
    if precision.dtype != "bf16":
        fix = (
            "cannot be moved to the host with performance.optimizer_offload_fraction; set it to bf16, or that to null."
        )
        yield Problem("precision.dtype", precision.dtype, fix)
    if precision.use_precision_aware_optimizer:
        fix = "is for state on the device; set it to null, or performance.optimizer_offload_fraction."
        yield Problem("precision.use_precision_aware_optimizer", "true", fix)
    if config.performance.fp8_param_gather:
        fix = "goes not with performance.optimizer_offload_fraction; set one of them to null."
        yield Problem("performance.fp8_param_gather", "true", fix)


def overlaps(config: RunConfig, world_size: int) -> _Answer:
    """Whether messages of data parallelism can hide behind compute on GPUs."""
    parallel = config.parallel
    peers = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if peers <= 1:
        return False, "no other rank holds the same weights"
    return True, f"{peers} ranks share the gradients of a weight"


def _grad_reduce(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if not machine.gpu:
        return False, "a CPU that sends does not compute"
    return overlaps(config, world_size)


def _param_gather(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if not config.parallel.overlap_grad_reduce:
        return False, "goes with parallel.overlap_grad_reduce"
    return True, "each bucket's weights are gathered before the layer that needs them"


def _fused(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if machine.backend == "te":
        return True, "the te backend has them"
    return False, "the torch backend has operations of its own (models/torch_backend/functions.py)"


def _compile(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if machine.backend == "te":
        return False, "Transformer Engine's operations are fused"
    if machine.gpu:
        return False, "was never measured by this project on a GPU; worth trying"
    if not machine.compiler:
        return False, "a C++ compiler (g++) is not there, or not known to be"
    tokens = config.training.train_iters * config.training.global_batch_size * config.data.seq_length
    work = training_flops_per_token(config.model, config.data.seq_length) * tokens / (world_size * machine.threads)
    if work < _COMPILE_FROM_FLOP:
        return False, f"too short to pay for the compiler: {work:.1e} FLOP a thread, of {_COMPILE_FROM_FLOP:.0e}"
    return True, "one kernel for each small operation"


def _lean_optimizer(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if machine.backend != "te" or config.precision.dtype != "bf16":
        return False, "needs Transformer Engine's Adam and bf16"
    if config.performance.optimizer_offload_fraction:
        return False, "the optimizer is on the host"
    if config.performance.fp8_param_gather:
        return False, "weights in FP8 have whole main weights"
    if machine.memory_gib is None:
        return False, "the device's memory is not known"
    need = _need(config, machine, world_size)
    if need <= machine.memory_gib:
        return False, f"not needed: {need:.0f} of {machine.memory_gib:.0f} GiB"
    lean = _need(config.with_section("precision", use_precision_aware_optimizer=True), machine, world_size)
    return True, f"an estimated {need:.0f} GiB of {machine.memory_gib:.0f} without it, {lean:.0f} with it"


def _recompute(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if machine.memory_gib is None:
        return "none", "the memory of a device is not known" if machine.gpu else "a CPU's memory is not shared out"
    if config.performance.cpu_offloading_num_layers:
        return "none", "megatron-core has no recompute beside performance.cpu_offloading_num_layers"
    need = _need(config, machine, world_size)
    if need <= machine.memory_gib:
        return "none", f"fits: an estimated {need:.0f} of {machine.memory_gib:.0f} GiB"
    modules = heavy_modules(config)
    changes = {"recompute_granularity": "selective", "recompute_modules": modules}
    selective = _need(config.with_section("training", **changes), machine, world_size)
    without = f"an estimated {need:.0f} GiB of {machine.memory_gib:.0f} without"
    if selective <= machine.memory_gib:
        return "selective", f"{without}, {selective:.0f} with {', '.join(modules)} computed again"
    if config.performance.cuda_graph_impl == "local":
        return "selective", f"{without}, {selective:.0f} with {', '.join(modules)}; graphs leave no more to recompute"
    full = _need(config.with_section("training", recompute_granularity="full"), machine, world_size)
    verdict = "" if full <= machine.memory_gib else "; that does not fit either"
    return "full", f"{without}, {selective:.0f} with selective recompute, {full:.0f} with whole layers{verdict}"


def heavy_modules(config: RunConfig) -> tuple[str, ...]:
    """What to compute again where a little is enough: fused attention keeps no scores, so not core_attn.

    What a person has named is kept.
    """
    if config.training.recompute_modules != TrainingConfig().recompute_modules:
        return config.training.recompute_modules
    return ("moe",) if config.model.is_moe else ("mlp",)


def _need(config: RunConfig, machine: Machine, world_size: int) -> float:
    """GiB of the fullest rank in the stage of the run that needs most."""
    return max(
        stage.total_gib
        for stage_config in stage_configs(config)
        for stage in memory_per_stage(stage_config, world_size=world_size, backend=machine.backend, gpu=machine.gpu)
    )


def _tensor_overlap(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if config.parallel.tensor_model_parallel_size == 1:
        return False, "no tensor parallelism"
    if machine.backend != "te" or not config.parallel.sequence_parallel:
        return False, "needs the te backend and sequence parallelism"
    return False, "was never measured by this project; set it to true to use Transformer Engine's buffers"


def _dispatcher(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if not config.model.is_moe:
        return "alltoall", "no experts"
    if config.parallel.expert_model_parallel_size == 1:
        return "alltoall", "every rank holds all experts"
    if machine.gpu and "deep_ep" in machine.libraries:
        return "deepep", "deep_ep imports"
    return "alltoall", "deep_ep is not there, or not known to be" if machine.gpu else "deep_ep has no CPU kernels"


def _shared_expert(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if config.model.moe_shared_expert_intermediate_size is None:
        return False, "no shared expert"
    if not machine.gpu:
        return False, "a CPU that sends does not compute"
    if config.parallel.expert_model_parallel_size == 1:
        return False, "no token travels"
    if config.performance.moe_token_dispatcher == "allgather":
        return False, "not with the allgather dispatcher"
    if config.training.recompute_granularity == "selective" and "shared_experts" in config.training.recompute_modules:
        return False, "the shared expert is recomputed"
    return True, "it computes while tokens travel"


def _grouped(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if not config.model.is_moe:
        return False, "no experts"
    if machine.backend == "te":
        return True, "Transformer Engine's grouped product"
    if config.precision.emulate_fp8:
        return False, "emulated FP8 rounds one expert at a time"
    return True, "one operation for all experts of a rank (models/torch_backend/experts.py)"


def _graphs(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if machine.backend != "te":
        return "none", "needs the te backend"
    return "none", "was never measured by this project; worth trying where a GPU waits for its host (small models)"


def _fp8_gather(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if config.precision.fp8 is None:
        return False, "no FP8"
    if machine.backend != "te":
        return False, "emulated FP8 keeps its weights in the run's format"
    return False, "was never measured by this project; halves what a gather of weights sends"


def _layer_offload(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    return 0, "recompute is chosen before it: the way to the host is slower than a GPU computes"


def _optimizer_offload(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    return 0.0, "more ranks or the lean optimizer are chosen before it"


def _collections(config: RunConfig, machine: Machine, world_size: int) -> _Answer:
    if world_size == 1:
        return 0, "no other rank waits for a collection"
    return _COLLECTION_INTERVAL, "else each rank stops for its own at another time, and all wait for it"


# Field -> what leaves it off, and who decides; later rules see what earlier ones chose.
_RULES: dict[str, tuple[Any, _Rule]] = {
    "performance.fused_kernels": (False, _fused),
    "performance.compile": (False, _compile),
    "parallel.overlap_grad_reduce": (False, _grad_reduce),
    "parallel.overlap_param_gather": (False, _param_gather),
    "performance.moe_grouped_gemm": (False, _grouped),
    "precision.use_precision_aware_optimizer": (False, _lean_optimizer),
    "training.recompute_granularity": ("none", _recompute),
    "performance.tp_comm_overlap": (False, _tensor_overlap),
    "performance.moe_token_dispatcher": ("alltoall", _dispatcher),
    "performance.moe_shared_expert_overlap": (False, _shared_expert),
    "performance.cuda_graph_impl": ("none", _graphs),
    "performance.fp8_param_gather": (False, _fp8_gather),
    "performance.cpu_offloading_num_layers": (0, _layer_offload),
    "performance.optimizer_offload_fraction": (0.0, _optimizer_offload),
    "performance.garbage_collection_interval": (0, _collections),
}
