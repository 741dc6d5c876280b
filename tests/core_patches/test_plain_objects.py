"""torch's planner takes plain objects of a shard and refuses others."""

import io
from types import SimpleNamespace
from typing import Any

import torch

from megatron_qwen.core_patches import plain_objects
from tests.core_patches.observe import outcome


class _Command:
    """What a crafted pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return len, ("ran",)


def observe(prepared: bool) -> dict[str, Any]:
    """What comes of a crafted object, and of what megatron-core saves."""
    if prepared:
        plain_objects.apply()
        plain_objects.apply()
    genuine = {"a": [1, 2.5, None], "b": torch.arange(3)}
    found = outcome(lambda: _loaded(genuine))
    found["b"] = found["b"].tolist()
    return {"crafted": outcome(lambda: _loaded(_Command())), "genuine": found}


def _loaded(thing: object) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    written = io.BytesIO()
    torch.save(thing, written)
    written.seek(0)
    planner: Any = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="thing")), written)
    return planner.state_dict["thing"]


def test_a_crafted_object_is_refused(observed):
    assert observed.plain["crafted"] == 3, "plain torch runs it"
    assert observed.prepared["crafted"] == "CheckpointError"


def test_plain_objects_are_loaded(observed):
    assert observed.prepared["genuine"] == observed.plain["genuine"] == {"a": [1, 2.5, None], "b": [0, 1, 2]}
