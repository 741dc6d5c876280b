"""Where a run gets its state: its own newest checkpoint, that of the run it branches from, or given weights."""

import logging
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_qwen.checkpoint import find, state
from megatron_qwen.checkpoint.paths import RUN_YAML
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.config.blend import stage_configs
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import CheckpointError, ConfigError, Problem, UserError
from megatron_qwen.hf.adapters import adapter_mappings
from megatron_qwen.optim.schedule_change import schedule_changes
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.environment_log import log_changes
from megatron_qwen.training.local_resume import resume_local
from megatron_qwen.training.lora_start import load_frozen, require_fitting
from megatron_qwen.training.turn_rows import describe, described_rows, tell_of_untrained

log = logging.getLogger(__name__)


def resume(components: TrainingComponents, directory: RunDirectory, *, before: int | None = None) -> int:
    """Loads the newest valid checkpoint of the run, else the one to branch or to start from, else nothing.

    A local checkpoint that is newer than all of them comes first.

    Args:
        components: to be filled.
        directory: of the run.
        before: only checkpoints of earlier iterations than this; None takes all.

    Returns:
        The iteration training resumes from.
    """
    settings, lora = components.config.checkpoint, components.config.lora
    base = load_frozen(components, directory) if lora.rank is not None else None
    if before is None and settings.local_interval is not None and resume_local(components, directory):
        return components.progress.iteration
    candidates, continues = _own(directory, before), True
    if not candidates and base is not None:
        return _begin_beside(base, components)
    if not candidates:
        beginning = settings.branch_from or settings.load
        if beginning is None:
            if dist.get_rank() == 0 and components.config.objective.kind != "pretrain":
                fix = "starts from random weights: checkpoint.load names no model"
                log.warning("objective.kind=%s %s", components.config.objective.kind, fix)
            return 0
        # A branch resumes another run with all its state; checkpoint.load starts a new run from its weights.
        candidates, continues = find.resolve(Path(beginning)), settings.branch_from is not None
    chosen = find.newest_good(candidates, strict=settings.strict)
    # Compares the shapes first: megatron-core would fail on a mismatch without naming the field.
    saved = state.read_state(chosen.path)
    require_fitting(saved, chosen.path, components, directory)
    reader = CheckpointReader(chosen.path)
    table = adapter_mappings(lora, components.config.model) if lora.rank is not None else None
    CheckpointWeights(reader, components.config.model, table)
    if not continues:
        _require_same_rope(chosen.path / RUN_YAML, components)
    rows = {} if continues else described_rows(components.config)
    change = partial(describe, components.model.modules, rows, components.groups.tp) if rows else None
    state.load_sharded(
        chosen.path,
        components.model.modules,
        components.optimizer,
        components.groups,
        optimizer_step=saved["optimizer_step"],
        change=change,
    )
    if dist.get_rank() == 0 and (rows or not state.has_optimizer(reader.tensors())):
        what = "objective.token_descriptions takes weights only" if rows else "holds weights only"
        log.info("%s: %s: the optimizer's moments start at zero", chosen.path, what)
    if not continues:  # a new run takes only weights, and moments if the checkpoint has them
        tell_of_untrained(components)
        return 0
    components.progress.restore(saved["progress"])
    if "data" not in saved:
        fix = (
            "has no data ledger because an older version wrote it, so it cannot be resumed. Start a new run from its "
            "weights with checkpoint.load."
        )
        raise CheckpointError(Problem(str(chosen.path), None, fix))
    components.data.resume(saved["data"])
    # Progress and ledger are written by the same save, so they must count the same samples.
    if components.data.consumed != components.progress.consumed_samples:
        fix = (
            f"does not match its data ledger ({components.data.consumed}): the checkpoint is damaged; use an older one."
        )
        raise CheckpointError(Problem(f"{chosen.path}: consumed_samples", components.progress.consumed_samples, fix))
    restored = state.restore_generators(chosen.path, parallel=components.config.parallel, state=saved)
    if dist.get_rank() == 0:
        log.info("resumed from %s at iteration %d", chosen.path, components.progress.iteration)
        _tell_of_schedule(chosen.path / RUN_YAML, components)
        log_changes(saved.get("environment"), of=str(chosen.path))
        if not restored:
            log.info("the parallel layout changed, so dropout generators were reseeded")
    return components.progress.iteration


def _begin_beside(base: Path, components: TrainingComponents) -> int:
    """Begins with new adapters beside a model whose weights are loaded; returns the iteration."""
    _require_same_rope(base / RUN_YAML, components)
    if rows := described_rows(components.config):
        describe(components.model.modules, rows, components.groups.tp)
    components.optimizer.reload_model_params()
    tell_of_untrained(components)
    return 0


def _own(directory: RunDirectory, before: int | None) -> list[find.CheckpointCandidate]:
    """The run's own checkpoints, newest first."""
    try:
        found = find.resolve(directory.checkpoints)
    except CheckpointError:
        return []
    return [candidate for candidate in found if before is None or candidate.iteration < before]


def _require_same_rope(run_yaml: Path, components: TrainingComponents) -> None:
    """Nothing in the weights tells of RoPE: with another base every position is another one.

    Pretraining changes it on purpose, for longer texts; fine-tuning does not.

    Raises:
        ConfigError: fine-tuning with another base than that of the last stage of the model's data.
    """
    config = components.config
    try:
        before = resolve(str(run_yaml), [], RECIPES)
    except UserError:
        if dist.get_rank() == 0:
            log.warning(
                "%s cannot be read: whether its model had rope.base = %g is not known", run_yaml, config.rope.base
            )
        return
    base, known = before.rope.base, True
    try:
        base = stage_configs(before)[-1].rope.base  # the last stage of its data may have another
    except UserError:
        known = False
    if config.rope.base == base:
        return
    told = f"{base:g}"
    fix = f"is not that of the model in checkpoint.load ({told}): its positions would be others; set rope.base={told}."
    problem = Problem("rope.base", f"{config.rope.base:g}", fix)
    if config.objective.kind != "pretrain" and known:
        raise ConfigError(problem)
    if dist.get_rank() == 0:
        log.warning("%s", problem)


def _tell_of_schedule(run_yaml: Path, components: TrainingComponents) -> None:
    """Warns where the run goes on along another curve than it has followed."""
    try:
        before = resolve(str(run_yaml), [], RECIPES)
    except UserError:  # an older version's, which this one cannot read whole
        return
    steps, consumed = components.progress.schedule_iteration, components.progress.consumed_samples
    for change in schedule_changes(before, components.config, steps=steps, consumed=consumed):
        log.warning("%s", change)
