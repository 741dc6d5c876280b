"""Resumes from a local checkpoint: what a rank held, found on its node or on another."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint import generators
from megatron_qwen.checkpoint.local.nodes import Nodes, expand, node_name, place_of_run
from megatron_qwen.checkpoint.local.restore import find_newest
from megatron_qwen.checkpoint.local.state import layout_hash, load_tensors, mismatch
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.lora_start import LoraStart

log = logging.getLogger(__name__)
# Names of the generators' states among a rank's tensors.
GENERATOR = "generator."


@dataclass(frozen=True)
class LocalPlace:
    """Where a run's local checkpoints are.

    Args:
        directory: on this node.
        nodes: of the run now.
        layout: hash of how the state is divided over ranks.
    """

    directory: Path
    nodes: Nodes
    layout: str


def local_place(components: TrainingComponents, directory: RunDirectory) -> LocalPlace | None:
    """The place; None before the first attempt is recorded. Called by all ranks together.

    Raises:
        ConfigError: checkpoint.local_dir cannot be a place on the nodes.
    """
    base = expand(components.config.checkpoint.local_dir, run_dir=directory.path)
    mine = (node_name(), AttemptLog(directory.attempts).run_id() if dist.get_rank() == 0 else None)
    everyone: list[tuple[str, str | None]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    run_id = everyone[0][1]
    if run_id is None:
        return None
    start = LoraStart.read(directory.lora_base) if components.config.lora.rank is not None else None
    layout = layout_hash(
        components.config,
        backend=components.backend.name,
        world_size=dist.get_world_size(),
        frozen="" if start is None else start.base.digest,
    )
    return LocalPlace(place_of_run(base, run_id), Nodes(tuple(name for name, _ in everyone)), layout)


def resume_local(components: TrainingComponents, directory: RunDirectory) -> bool:
    """Loads the newest local checkpoint that is newer than every committed one.

    Returns:
        Whether there was one.
    """
    place = local_place(components, directory)
    if place is None:
        return False
    newest = newest_committed(directory)

    def refuse(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> str | None:
        if facts["committed"] > newest:  # a person has removed it, and wants to go back before it
            return f"it continues the checkpoint of iteration {facts['committed']}, which is no longer there"
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(GENERATOR)}
        return mismatch(own, components.model, components.optimizer)

    found = find_newest(place.directory, place.nodes, layout=place.layout, newer_than=newest, refuse=refuse)
    if found is None:
        return False
    # Clones: torch.set_rng_state (2.13) reads whole words, and crashes on bytes that are not aligned in a piece.
    states = {name: tensor.clone() for name, tensor in found.tensors.items() if name.startswith(GENERATOR)}
    own = {name: tensor for name, tensor in found.tensors.items() if name not in states}
    load_tensors(own, components.model, components.optimizer, optimizer_step=found.facts["optimizer_step"])
    components.progress.restore(found.facts["progress"])
    components.data.resume(found.facts["data"])
    generators.restore({name.removeprefix(GENERATOR): tensor for name, tensor in states.items()})
    if dist.get_rank() == 0:
        how = f", {found.copies} of {dist.get_world_size()} pieces from other nodes" if found.copies else ""
        log.info("resumed from a local checkpoint at iteration %d%s", found.iteration, how)
    return True


def newest_committed(directory: RunDirectory) -> int:
    """Iteration of the newest committed checkpoint, 0 without one; the same on every rank, from rank 0's look."""
    newest = [0]
    if dist.get_rank() == 0:
        newest[0] = next((iteration for iteration, _ in committed(directory.checkpoints)), 0)
    dist.broadcast_object_list(newest)
    return newest[0]
