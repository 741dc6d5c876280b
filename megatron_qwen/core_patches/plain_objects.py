"""torch's checkpoint loader takes tensors and plain containers only, whatever a shard holds.

Replaces: ``load_bytes`` of ``torch.distributed.checkpoint.default_planner.DefaultLoadPlanner``, which megatron-core's
    planner inherits. Beside tensors a shard holds pickled objects; they are read with ``weights_only=True``, written
    again and handed on.
Needed: with every torch so far (2.15 too), which reads them with ``weights_only=False``: a crafted shard runs any
    command. The metadata file, which torch reads with plain pickle, is read by checkpoint/metadata.py first.
When: before a checkpoint is loaded; checkpoint/metadata.py applies it, so that no load can come before it.
Upstream: pytorch/pytorch issue 189308 (open) is about the metadata file.
Can go: when the planner reads objects with ``weights_only=True``.
"""

import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from megatron_qwen.core_patches.replacement import wrap
from megatron_qwen.errors import CheckpointError, Problem


def apply() -> None:
    """Wraps the method, once."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    wrap(DefaultLoadPlanner, "load_bytes", _restricted)


def _restricted(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(Problem(name, None, f"is refused: {why} Do not load this checkpoint.")) from None
        rewritten = io.BytesIO()
        torch.save(content, rewritten)
        rewritten.seek(0)
        plain(self, read_item, rewritten)

    return load_bytes
