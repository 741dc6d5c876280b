"""The checkpoint whose frozen weights the adapters of another one belong to.

A checkpoint of a run with LoRA holds what is trained. Which weights that was trained beside is noted in it: where they
were, and the hash of their manifest, which names the hash of every file. So other weights are never taken in their
place, and a base that was moved is found where it is named.
"""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint import find, manifest
from megatron_qwen.checkpoint.paths import LORA_BASE, MANIFEST
from megatron_qwen.errors import CheckpointError, Problem


@dataclass(frozen=True)
class LoraBase:
    """A base.

    Args:
        path: one iteration's directory, absolute.
        digest: xxh3-128 of its manifest.
    """

    path: str
    digest: str

    def as_json(self) -> dict[str, str]:
        """For state.json."""
        return asdict(self)


def identified(path: Path) -> LoraBase:
    """The base at a directory that has been verified."""
    return LoraBase(str(path.absolute()), manifest.hash_file(path / MANIFEST).xxh3_128)


def noted(state: dict[str, Any]) -> LoraBase | None:
    """What state.json of a checkpoint says of its base; None where its weights are whole."""
    found = state.get(LORA_BASE)
    return LoraBase(str(found["path"]), str(found["digest"])) if isinstance(found, dict) else None


def locate(base: LoraBase, *, also: Path | None, wanted_by: str) -> Path:
    """The directory of a base: where it was, or among the checkpoints at another place.

    Args:
        base: as it was noted.
        also: a run directory, a checkpoint root or one iteration where it may be now.
        wanted_by: what has the adapters, for the message.

    Raises:
        CheckpointError: nothing at either place has these weights.
    """
    places = [Path(base.path)]
    if also is not None:
        with contextlib.suppress(CheckpointError):
            places += [candidate.path for candidate in find.resolve(also)]
    for place in places:
        if (place / MANIFEST).is_file() and manifest.hash_file(place / MANIFEST).xxh3_128 == base.digest:
            return place
    there = "has other weights now" if (Path(base.path) / MANIFEST).is_file() else "is not there"
    looked = "" if also is None else f", and {also} does not have them either"
    fix = (
        f"{there}{looked}: the adapters of {wanted_by} are for the weights it had. Put that checkpoint back; of a run "
        "that began with it checkpoint.load may name its new place, and mq convert merge --base makes whole weights."
    )
    raise CheckpointError(Problem(base.path, None, fix))
