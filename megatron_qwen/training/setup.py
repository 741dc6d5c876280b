"""Builds the parts of a run, one ``build_*`` each, in the order in which they need one another."""

import importlib
import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.core_patches.group_step_adam import adam_in_use
from megatron_qwen.data.loaders.batches import Shard
from megatron_qwen.data.loaders.read_ahead import Loader, MemoryMapLoader
from megatron_qwen.data.reading.preflight import require_legal_stages
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.distributed import groups as process_groups
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.choices import Choice, choose, impossible
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.models.apex_kernels import foreign_apex_is_here
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.backend import choose as choose_backend
from megatron_qwen.models.build import Model, build_model
from megatron_qwen.models.torch_backend.compiled import Kernels, compiler_failure, compiler_is_here
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS
from megatron_qwen.optim.build import build_optimizer
from megatron_qwen.training.forward import ForwardStep, loss_chunk_tokens, make_forward_step
from megatron_qwen.training.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Everything a step needs.

    Args:
        config: the run, with every choice of the preset made.
        asked: the run as it was asked for.
        choices: what the preset chose, and why.
        groups: process groups of this rank.
        backend: whose kernels compute.
        model: chunks of this rank.
        optimizer: sharded over data-parallel ranks.
        data: training and validation samples.
        loader: reads batches ahead.
        shard: this rank's part of a batch.
        forward_step: what the schedule calls.
        progress: counters, changed by the trainer.
    """

    config: RunConfig
    asked: RunConfig
    choices: list[Choice]
    groups: ProcessGroupCollection
    backend: Backend
    model: Model
    optimizer: ChainedOptimizer
    data: TrainingData
    loader: Loader
    shard: Shard
    forward_step: ForwardStep
    progress: Progress


def build_parts(config: RunConfig) -> Parts:
    """Builds a run on this rank; torch.distributed must have been joined.

    Args:
        config: a legal configuration.

    Raises:
        ConfigError: it asks for what cannot be done here.
    """
    asked, backend = config, choose_backend(config.precision)
    machine = common_machine(backend)
    if wrong := list(impossible(config, machine)):
        raise ConfigError(wrong)
    config, choices = choose(config, machine, world_size=dist.get_world_size())
    data = TrainingData(config)
    groups = process_groups.create(
        config.parallel, seed=config.training.seed, graphs=config.performance.cuda_graph_impl == "local"
    )
    config, choices = start_kernels(config, choices)
    place = device.current()
    model = build_model(config, groups, backend, device=place)
    optimizer = build_optimizer(config, model, groups)
    connect(model, optimizer, groups)
    if dist.get_rank() == 0:
        if foreign_apex_is_here():
            log.info("the installed package apex is not NVIDIA's (PyPI's is another project) and is not used")
        adam = adam_in_use()
        log.info("backend %s (%s); optimizer: %s; device: %s", backend.name, backend.reason, adam, device.device_name())
        log.info("performance: output layer and cross-entropy in one, %d tokens at once", loss_chunk_tokens(config))
        for choice in choices:
            log.info("performance: %s", choice)
    require_legal_stages(data, world_size=dist.get_world_size())
    require_separable(data, backend)
    shard = Shard(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size(), place)
    return Parts(
        config=config,
        asked=asked,
        choices=choices,
        groups=groups,
        backend=backend,
        model=model,
        optimizer=optimizer,
        data=data,
        loader=build_loader(config, shard),
        shard=shard,
        forward_step=make_forward_step(config, groups),
        progress=Progress(),
    )


def common_machine(backend: Backend) -> Machine:
    """What all ranks compute on: the least memory, and the libraries that every one of them has.

    All must choose alike, or they wait for one another.
    """
    libraries = frozenset(name for name in ("deep_ep",) if device.has_cuda() and _imports(name))
    mine = Machine(
        backend.name,
        device.has_cuda(),
        device.total_memory_gib(),
        libraries,
        compiler=compiler_is_here(),
        threads=torch.get_num_threads(),
    )
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len(names := {one.backend for one in everyone}) > 1:
        fix = f"is {' on some ranks and '.join(sorted(names))} on others; set precision.backend."
        raise ConfigError(Problem("backend", None, fix))
    memory = [one.memory_gib for one in everyone if one.memory_gib is not None]
    return replace(
        mine,
        memory_gib=min(memory) if memory else None,
        libraries=frozenset.intersection(*(one.libraries for one in everyone)),
        compiler=all(one.compiler for one in everyone),
        threads=max(one.threads for one in everyone),
    )


def start_kernels(config: RunConfig, choices: list[Choice]) -> tuple[RunConfig, list[Choice]]:
    """Has the small operations compiled, on all ranks or on none: they would round differently.

    Args:
        config: the run, with every choice of the preset made.
        choices: those choices.

    Returns:
        Both, without kernels where a rank's compiler does not work.

    Raises:
        ConfigError: it does not, and kernels were asked for.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    if config.performance.compile:
        dist.all_gather_object(reasons, compiler_failure())
    broken = next(((rank, reason) for rank, reason in enumerate(reasons) if reason is not None), None)
    if broken is not None:
        reason = "torch.compile does not work on rank {}: {}".format(*broken)
        field = "performance.compile"
        if any(choice.forced for choice in choices if choice.field == field):
            fix = f"{reason}. Install g++ there, or set it to false."
            raise ConfigError(Problem(field, "true", fix))
        config = config.with_section("performance", compile=False)
        off = Choice(field, False, reason)
        choices = [off if choice.field == field else choice for choice in choices]
    PROCESS_KERNELS.use(Kernels() if config.performance.compile else None)
    return config, choices


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # whatever a broken library raises
        return False
    return True


def require_separable(data: TrainingData, backend: Backend) -> None:
    """Raises ConfigError where a stage has independent sequences that this backend cannot share over CP ranks.

    Transformer Engine wants each sequence cut into 2 x CP chunks of its own; rows are cut as a whole here.
    """
    if backend.name != "te" or data.config.parallel.context_parallel_size == 1:
        return
    fix = "keeps sequences apart, which the te backend does not do with context parallelism; set one of them off."
    wrong = [Problem(f"stage {stage.name}", None, fix) for stage in data.blend.stages if data.separates(stage)]
    if wrong:
        raise ConfigError(wrong)


def build_loader(config: RunConfig, shard: Shard) -> Loader:
    """What reads batches ahead."""
    if config.data.loader == "dali":
        from megatron_qwen.data.loaders.dali_loader import DaliLoader

        return DaliLoader(shard, ahead=config.data.prefetch_steps)
    return MemoryMapLoader(shard, ahead=config.data.prefetch_steps)


def connect(model: Model, optimizer: ChainedOptimizer, groups: ProcessGroupCollection) -> None:
    """Tells megatron-core's schedules how this model's gradients are finished and synchronised."""
    core = model.core
    core.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    core.grad_scale_func = optimizer.scale_loss
    overlapped = model.chunks[0].ddp_config.overlap_grad_reduce
    single = len(model.chunks) == 1
    if overlapped:
        syncs = [chunk.no_sync for chunk in model.chunks]
        core.no_sync_func = syncs[0] if single else syncs
        starts = [chunk.start_grad_sync for chunk in model.chunks]
        core.grad_sync_func = starts[0] if single else starts
    if model.chunks[0].ddp_config.overlap_param_gather:
        gathers = [chunk.start_param_sync for chunk in model.chunks]
        core.param_sync_func = gathers[0] if single else gathers
