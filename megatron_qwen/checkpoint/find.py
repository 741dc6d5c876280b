"""Finds the newest checkpoint that passes verification."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.checkpoint.paths import MANIFEST, committed
from megatron_qwen.errors import CheckpointError, Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointCandidate:
    """A checkpoint directory and its iteration."""

    iteration: int
    path: Path


def resolve(path: Path) -> list[CheckpointCandidate]:
    """Candidates under a run directory, a checkpoint root or one iteration, newest first.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file() or (path / ".metadata").is_file():
        digits = path.name.removeprefix("iter_")
        return [CheckpointCandidate(int(digits) if digits.isdigit() else 0, path)]
    for root in (path / "checkpoints", path):
        if found := committed(root):
            return [CheckpointCandidate(*item) for item in found]
    raise CheckpointError(Problem(str(path), None, "holds no committed checkpoint (a directory iter_*)."))


def newest_good(candidates: list[CheckpointCandidate], *, strict: bool) -> CheckpointCandidate:
    """The newest candidate whose files all match its manifest. The ranks share the reading.

    Args:
        candidates: newest first.
        strict: refuse if the newest is damaged, instead of falling back.

    Raises:
        CheckpointError: no candidate is valid, or strict is set and the newest is not; names the damaged files.
    """
    all_damage: list[Problem] = []
    for candidate in candidates:
        damage = shared_damage(candidate.path)
        if not damage:
            return candidate
        all_damage += damage
        if strict:
            raise CheckpointError(
                [
                    *damage,
                    Problem(
                        "checkpoint.strict",
                        "true",
                        "does not allow falling back to an older checkpoint; set it to false to do so.",
                    ),
                ]
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            named = "; ".join(str(problem) for problem in damage)
            log.warning("checkpoint %s is damaged, trying the next older one: %s", candidate.path, named)
    raise CheckpointError(
        [*all_damage, Problem(str(candidates[-1].path.parent), None, "none of its checkpoints is valid.")]
    )


def shared_damage(directory: Path) -> list[Problem]:
    """``manifest.damage`` with the files divided over the ranks; every rank gets the whole list."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return manifest.damage(directory) or _metadata_damage(directory)
    entries = manifest.read(directory)
    if isinstance(entries, Problem):
        return [entries]
    mine = sorted(entries)[dist.get_rank() :: dist.get_world_size()]
    answers: list[list[Problem]] = [[] for _ in range(dist.get_world_size())]
    unknown = manifest.unknown_files(directory, entries) if dist.get_rank() == 0 else []
    dist.all_gather_object(answers, manifest.damage(directory, mine) + unknown)
    return [problem for answer in answers for problem in answer] or _metadata_damage(directory)


def _metadata_damage(directory: Path) -> list[Problem]:
    try:
        read_metadata(directory)
    except CheckpointError as error:
        return list(error.problems)
    return []
