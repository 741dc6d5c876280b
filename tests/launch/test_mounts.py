"""Directories that the ranks of a job need inside a container."""

import json
from types import SimpleNamespace

import pytest

from launch.freeze import _mounted
from megatron_qwen.recipes.registry import RECIPES


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/iter_0000002"])
@pytest.mark.parametrize("state", [{"lora_base": {"path": "/frozen/base", "digest": "0"}}, {}], ids=["lora", "whole"])
def test_the_base_of_adapters_is_mounted(named, state, tmp_path):
    """A run that begins with adapters reads the frozen weights where their checkpoint names them."""
    for iteration in (1, 2):
        place = tmp_path / "run" / "checkpoints" / f"iter_{iteration:07d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps(state))
    load = str(tmp_path / named)
    config = RECIPES["tiny_dense"]().with_section("checkpoint", load=load)
    found = [str(path) for path in _mounted(SimpleNamespace(run_dir=tmp_path / "new", config=config))]
    assert load in found
    assert ("/frozen/base" in found) is bool(state)
