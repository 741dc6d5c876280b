"""Builds the components of a run on a rank, each after the components that it needs."""

import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.core_patches.group_step_adam import adam_in_use
from megatron_qwen.data.loaders.batches import BatchSlice
from megatron_qwen.data.loaders.read_ahead import Loader, MemoryMapLoader
from megatron_qwen.data.reading.preflight import require_legal_stages
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.distributed import groups as process_groups
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.choices import choose, impossible
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.backend import choose as choose_backend
from megatron_qwen.models.build import build_model
from megatron_qwen.objectives.base import Objective
from megatron_qwen.objectives.build import build_objective
from megatron_qwen.optim.build import build_optimizer
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.kernels import start_kernels
from megatron_qwen.training.machine import common_machine
from megatron_qwen.training.progress import TrainingProgress
from megatron_qwen.training.router_losses import with_router_losses
from megatron_qwen.training.schedule_hooks import install_schedule_hooks
from megatron_qwen.training.start_log import log_build


def build_components(config: RunConfig) -> TrainingComponents:
    """Builds a run on this rank; torch.distributed must have been joined.

    Args:
        config: a legal configuration.

    Raises:
        ConfigError: it asks for something that is impossible on this machine.
    """
    asked, backend = config, choose_backend(config.precision)
    machine = common_machine(backend)
    if wrong := list(impossible(config, machine)):
        raise ConfigError(wrong)
    # Fills in the fields that are null. Everything below reads the chosen values.
    config, choices = choose(config, machine, world_size=dist.get_world_size())
    # Before groups and model, which take minutes at scale: a wrong path is reported at once.
    data = TrainingData(config)
    objective = build_objective(config, ends_of_turn=data.ends_of_turn, loss_unit=data.loss_unit)
    require_fields(data, objective)
    # Before megatron-core is asked for an optimizer, which then finds this Adam.
    groups = process_groups.create(
        config.parallel, seed=config.training.seed, graphs=config.performance.cuda_graph_impl == "local"
    )
    # The one choice that needs a trial: whether torch.compile works on every rank.
    config, choices = start_kernels(config, choices)
    place = device.current()
    model = build_model(with_router_losses(config, data), groups, backend, device=place)
    optimizer = build_optimizer(config, model, groups)
    install_schedule_hooks(model, optimizer, groups)
    if dist.get_rank() == 0:
        log_build(backend, adam=adam_in_use())
    require_legal_stages(data, world_size=dist.get_world_size())
    require_packed_support(data, backend)
    batch_slice = BatchSlice(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size(), place)
    return TrainingComponents(
        config=config,
        asked=asked,
        choices=choices,
        groups=groups,
        backend=backend,
        model=model,
        optimizer=optimizer,
        data=data,
        loader=build_loader(config, batch_slice),
        batch_slice=batch_slice,
        forward_step=ForwardStep(config, groups, objective),
        progress=TrainingProgress(),
    )


def build_loader(config: RunConfig, batch_slice: BatchSlice) -> Loader:
    """The loader that data.loader names."""
    if config.data.loader == "dali":
        from megatron_qwen.data.loaders.dali_loader import DaliLoader  # an optional extra that most installations lack

        return DaliLoader(batch_slice, ahead=config.data.prefetch_steps)
    return MemoryMapLoader(batch_slice, ahead=config.data.prefetch_steps)


def require_packed_support(data: TrainingData, backend: Backend) -> None:
    """Raises ConfigError if a data stage packs sequences and the backend cannot split packed rows over CP ranks.

    Transformer Engine expects every packed sequence to be cut into 2 x CP chunks of its own. The loaders cut the row as
    a whole, so the chunks would belong to the wrong sequences.
    """
    if backend.name != "te" or data.config.parallel.context_parallel_size == 1:
        return
    fix = (
        "packs sequences, which cannot be combined with parallel.context_parallel_size > 1 in the te backend: use "
        "context_parallel_size=1, precision.backend=torch, or a stage without packing."
    )
    wrong = [Problem(f"stage {stage.name}", None, fix) for stage in data.blend.stages if data.is_packed(stage)]
    if wrong:
        raise ConfigError(wrong)


def require_fields(data: TrainingData, objective: Objective) -> None:
    """Raises ConfigError if the objective needs fields that the samples, or those of the validation, do not have."""
    sources = {"this data": data.extra_fields}
    if data.config.training.eval_iters and data.config.data.validation_fraction:
        sources["its held-out part (training.eval_iters)"] = data.held_out_fields
    problems = []
    for source, fields in sources.items():
        there = {field.name for field in fields}
        if missing := [field.name for field in objective.extra_fields if field.name not in there]:
            fix = f"needs {', '.join(missing)} beside the tokens, which {source} does not have."
            problems.append(Problem("objective.kind", data.config.objective.kind, fix))
    if problems:
        raise ConfigError(problems)
