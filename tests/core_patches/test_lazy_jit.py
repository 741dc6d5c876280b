"""megatron-core's functions are compiled when they are first called; a start does not import the compiler."""

import subprocess
import sys
from typing import Any

import torch

from tests.conftest import environment

START = """
import sys
from megatron_qwen.core_patches.install import prepare_process
prepare_process()
import megatron_qwen.training.attempt
import torch
from megatron.core.optimizer import Adam
weight = torch.nn.Parameter(torch.ones(3))
optimizer = Adam([weight], lr=0.1)
weight.grad = torch.ones(3)
optimizer.step()
state = optimizer.state_dict()
optimizer.load_state_dict(state)
imported = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
assert not imported, imported
"""


def observe(prepared: bool) -> dict[str, Any]:
    """Whether a function of megatron-core is compiled at import, and what becomes of one that is called."""
    from megatron.core.fusions import fused_bias_swiglu
    from torch._dynamo.utils import counters

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    def inner(x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return x * 2

    def foreign(x: torch.Tensor) -> torch.Tensor:
        return x - 1

    inner.__module__ = "megatron.core.example"
    inner = torch.compile(inner, backend=backend)
    decorate = torch.compile(backend=backend)

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + 1

    outer.__module__ = "megatron.core.example"
    outer = decorate(outer)
    frames = counters["frames"]["total"]
    results = [outer(torch.ones(2)).tolist(), outer(torch.ones(2)).tolist(), inner(torch.ones(2)).tolist()]
    return {
        "at import": _is_compiled(fused_bias_swiglu.swiglu),
        "at decoration": [_is_compiled(function) for function in (inner, outer)],
        "foreign": _is_compiled(torch.compile(foreign, backend=backend)),
        "name": [inner.__name__, inner.__doc__],
        "results": results,
        "graphs": graphs,
        "traced": counters["frames"]["total"] - frames,
    }


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def test_compiled_at_the_first_call(observed):
    assert observed.plain["at import"]
    assert not observed.prepared["at import"]
    assert observed.plain["at decoration"] == [True, True]
    assert observed.prepared["at decoration"] == [False, False]
    assert observed.prepared["foreign"], "only megatron-core's wait"


def test_the_same_graphs_and_results(observed):
    """One graph holds the inner function too, and is used again; the inner one by itself is another."""
    for name in ("results", "graphs", "traced", "name"):
        assert observed.prepared[name] == observed.plain[name], name
    assert observed.prepared["results"] == [[3.0, 3.0], [3.0, 3.0], [2.0, 2.0]]
    assert observed.prepared["graphs"] == [1, 1]


def test_a_start_does_not_import_the_compiler():
    """In an interpreter of its own: the one that tests are forked from has imported it."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", START], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
