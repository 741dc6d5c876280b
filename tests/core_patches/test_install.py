"""Processes are prepared in order, once, and never at import; every patch says what it is."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_qwen import core_patches
from tests.conftest import environment

NO_PATCHES = {"install", "replacement"}
PATCHES = sorted({module.name for module in pkgutil.iter_modules(core_patches.__path__)} - NO_PATCHES)
FIELDS = ("Replaces: ", "Needed: ", "When: ", "Can go: ")

WITH_A_GPU = """
import torch
names = [name for name in dir(torch.cuda) if not name.startswith("__")]
before = {name: getattr(torch.cuda, name) for name in names}
others = (torch.empty, torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda)
collectives = (torch.distributed.all_gather, torch.distributed.reduce_scatter, torch.distributed.all_gather_into_tensor)
from megatron_qwen.core_patches import install
install._before_core(gpu=True)
assert all(getattr(torch.cuda, name) is value for name, value in before.items())
assert others == (
    torch.empty, torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda
)
assert collectives == (
    torch.distributed.all_gather, torch.distributed.reduce_scatter, torch.distributed.all_gather_into_tensor
)
install._after_core(gpu=True)
from megatron.core.transformer.moe import moe_utils
assert moe_utils.maybe_move_tensor_to_cpu.__module__ == moe_utils.__name__
"""


def observe(prepared: bool) -> dict[str, Any]:
    """Whether torch is patched: ``observe.py`` has imported install in both processes and called it in one, twice."""
    patched = {"all_gather": dist.all_gather, "compile": torch.compile, "empty": torch.empty}
    return {name: hasattr(function, "_replaces") for name, function in patched.items()} | {
        "once": not any(hasattr(getattr(function, "_replaces", None), "_replaces") for function in patched.values())
    }


def test_patched_by_the_call_and_not_by_the_import(observed):
    assert observed.plain == {"all_gather": False, "compile": False, "empty": False, "once": True}
    assert observed.prepared == {"all_gather": True, "compile": True, "empty": True, "once": True}


def test_where_a_gpu_is_nothing_stands_for_it():
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITH_A_GPU], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_says_what_it_is(name):
    patch = importlib.import_module(f"megatron_qwen.core_patches.{name}")
    assert callable(patch.apply)
    missing = [field for field in FIELDS if f"\n{field}" not in patch.__doc__]
    assert not missing, missing
    needed = patch.__doc__.split("\nNeeded: ")[1].split("\nWhen: ")[0]
    assert re.search(r"(megatron-core|torch).*\d\.\d+", needed, re.DOTALL), "it names the version that it was seen with"
    assert (Path(__file__).parent / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_imports_megatron_core_in_its_functions_only(name):
    """Else those that must come before megatron-core would come after it."""
    tree = ast.parse((Path(core_patches.__path__[0]) / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("megatron."), node.lineno
