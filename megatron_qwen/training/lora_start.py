"""Where a run with LoRA gets the weights that its adapters are for, at every start."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwen.checkpoint import find, state
from megatron_qwen.checkpoint.lora_base import LoraBase, identified, locate, noted
from megatron_qwen.checkpoint.paths import LORA_BASE, RUN_YAML, committed
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import CheckpointError, ConfigError, Problem
from megatron_qwen.estimate.adapters import described
from megatron_qwen.files import atomic_write_json
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.components import TrainingComponents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraStart:
    """What a run noted when it first began (lora_base.json).

    Args:
        base: whose weights are frozen.
        named: what the configuration named: checkpoint.load, or the run to branch from.
        new_adapters: whether that was the base itself; otherwise it had adapters, which this run goes on with.
    """

    base: LoraBase
    named: str
    new_adapters: bool

    def write(self, path: Path) -> None:
        """Notes it."""
        atomic_write_json(path, {LORA_BASE: self.base.as_json(), "named": self.named, "new": self.new_adapters})

    @staticmethod
    def read(path: Path) -> "LoraStart | None":
        """What was noted, if anything.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text())
            base = noted(content)
            return None if base is None else LoraStart(base, str(content["named"]), bool(content["new"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            fix = "cannot be read; remove it: the run's newest checkpoint notes the same, if there is one."
            raise CheckpointError(Problem(str(path), None, fix)) from None


def load_frozen(components: TrainingComponents, directory: RunDirectory) -> Path | None:
    """Fills the frozen weights; all ranks call it. The first start notes in the run directory which they are.

    Returns:
        The base, where a run that has no checkpoint yet begins with new adapters; else None: its adapters are in a
        checkpoint, its own or that of another run.

    Raises:
        CheckpointError: the weights are not there, or damaged.
        ConfigError: the run would begin from what cannot be a base.
    """
    settings = components.config.checkpoint
    start, verified = _start_of_run(directory, settings), False
    if start is None:
        start = _first_start(settings)
        verified = start.new_adapters  # every file was read when it was chosen
        if dist.get_rank() == 0:
            start.write(directory.lora_base)
    also = None if settings.load is None else Path(settings.load)
    place = locate(start.base, also=also, wanted_by=str(directory.path))
    if not verified and (damage := find.shared_damage(place)):
        raise CheckpointError(damage)
    CheckpointWeights(CheckpointReader(place), components.config.model)  # compares shapes
    state.load_base(place, components.model.modules, components.groups)
    if dist.get_rank() == 0:
        log.info("%s; the frozen weights are those of %s", described(components.config), place)
    return place if start.new_adapters else None


def base_of_run(directory: RunDirectory) -> dict[str, Any]:
    """What every checkpoint of a run notes of its base, for state.json; nothing without LoRA."""
    start = LoraStart.read(directory.lora_base)
    return {} if start is None else {LORA_BASE: asdict(start.base)}


def require_fitting(saved: dict[str, Any], path: Path, components: TrainingComponents, directory: RunDirectory) -> None:
    """Compares what a checkpoint holds with what the run trains.

    Args:
        saved: its state.json.
        path: the checkpoint.
        components: of the run.
        directory: of the run.

    Raises:
        ConfigError: it holds adapters alone, and the run trains all weights; or the run scales them otherwise.
        CheckpointError: its adapters are for other weights than the run has loaded.
    """
    theirs = noted(saved)
    if components.config.lora.rank is None:
        if theirs is not None:
            fix = "holds adapters (LoRA) alone: merge them first (mq convert merge), or train on with the same lora.*."
            raise ConfigError(Problem("checkpoint.load", path, fix))
        return
    _require_same_scale(path, components)
    start = LoraStart.read(directory.lora_base)
    if start is not None and (theirs is None or theirs.digest != start.base.digest):
        of = "whole weights" if theirs is None else f"adapters for {theirs.path}"
        fix = f"has {of}, but {directory.lora_base} names {start.base.path}; use the checkpoints of one run."
        raise CheckpointError(Problem(str(path), None, fix))


def _require_same_scale(path: Path, components: TrainingComponents) -> None:
    """Nothing in the tensors says what their product is multiplied by."""
    mine, before = components.config.lora, resolve(str(path / RUN_YAML), [], RECIPES).lora
    if before.rank is None:
        return  # whole weights, which is said elsewhere
    if (mine.rank, mine.scale) != (before.rank, before.scale):
        has, had = (
            f"lora.rank={one.rank} lora.alpha={one.alpha:g} lora.use_rslora={str(one.use_rslora).lower()}"
            for one in (mine, before)
        )
        fix = (
            f"makes adapters of rank {mine.rank} scaled by {mine.scale:g}; those of {path} have rank {before.rank} "
            f"and are scaled by {before.scale:g}: set {had}."
        )
        raise ConfigError(Problem("lora", has, fix))


def _start_of_run(directory: RunDirectory, settings: CheckpointConfig) -> LoraStart | None:
    """What the run has begun with, as rank 0 sees it; None where it has no checkpoint and another model is named."""
    told: list[LoraStart | None] = [None]
    if dist.get_rank() == 0:
        told[0] = _own_start(directory, str(settings.branch_from or settings.load))
    dist.broadcast_object_list(told)
    return told[0]


def _own_start(directory: RunDirectory, named: str) -> LoraStart | None:
    own = committed(directory.checkpoints)
    start = LoraStart.read(directory.lora_base)
    if start is not None:
        return start if own or start.named == named else None
    for _, path in own:  # somebody has removed the note
        if (base := noted(state.read_state(path))) is not None:
            start = LoraStart(base, named, new_adapters=False)
            start.write(directory.lora_base)
            return start
    return None


def _first_start(settings: CheckpointConfig) -> LoraStart:
    named = settings.branch_from or settings.load
    assert named is not None  # checked with the configuration
    chosen = find.newest_good(find.resolve(Path(named)), strict=settings.strict)
    base = noted(state.read_state(chosen.path))
    if base is None and settings.branch_from is not None:
        fix = "is a run that trains all weights; adapters begin beside its weights: name it as checkpoint.load instead."
        raise ConfigError(Problem("checkpoint.branch_from", named, fix))
    return LoraStart(base or identified(chosen.path), named, new_adapters=base is None)
