"""What an attempt computes with, written beside its logs; and what that means for a resume."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwen.distributed.environment import changes, differing_nodes, environment_of_attempt
from megatron_qwen.files import atomic_write_json

log = logging.getLogger(__name__)
ENVIRONMENT = "environment.json"
_NAMED = 12


def record_environment(path: Path) -> None:
    """Rank 0 writes what it computes with, and names nodes that compute with something else; every rank must call.

    Args:
        path: environment.json in the directory of the attempt's logs.
    """
    odd = differing_nodes()
    if dist.get_rank():
        return
    for line in odd:
        log.warning("this node does not compute with what rank 0 computes with: %s", line)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {**environment_of_attempt(), "differing_nodes": odd})
    except OSError as error:  # a record must not end what it records
        log.warning("%s could not be written: %s", path, error.strerror)


def log_changes(before: Mapping[str, Any] | None, *, of: str) -> None:
    """Logs what is otherwise than at the save that the run goes on from, and whether it goes on bit for bit.

    Args:
        before: environment in the state of the checkpoint; None of a checkpoint of an earlier version.
        of: path of the checkpoint.
    """
    if before is None:
        log.info("%s does not say what it was computed with, so this cannot be compared", of)
        return
    found = changes(before, environment_of_attempt())
    for matters, meaning in (
        (True, "values may differ in their last bits, so the run goes on, but not bit for bit as it would have"),
        (False, "these compute no values, so no effect on them is expected"),
    ):
        if listed := [str(one) for one in found if one.may_change_values is matters]:
            more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
            log.warning("changed since %s: %s%s: %s", of, ", ".join(listed[:_NAMED]), more, meaning)
    if not found:
        log.debug("code, packages and machine are those of %s", of)
