"""megatron-core's functions are compiled at their first call, and torch's compiler is imported with the first of them.

Replaces: ``torch.compile``, for functions of megatron-core only; all others go to torch as before. What it returns
    makes the compiled function when it is first called, so results are those of ``torch.compile``. A function that is
    called while another one is traced is traced with it, as torch does with compiled functions.
Needed: with megatron-core 0.19.2, whose ``jit_fuser`` (megatron/core/jit.py) is ``torch.compile``. It decorates some
    forty functions at import, and the first decoration imports torch._dynamo and torch._inductor: the imports of a rank
    on a CPU took 8.3 to 9.7 CPU seconds, and 5.5 to 5.8 with this patch. A dense run calls none of these functions, nor
    does a mixture-of-experts run with expert_bias.py. Up to the first step a rank took 10.0 (dense) and 8.9 (MoE) CPU
    seconds, and 6.4 and 5.9 with both patches and GroupStepAdamW, which does not import the compiler either.
When: before megatron.core is imported, on every process.
Upstream: NVIDIA/TransformerEngine pull request 1599 (merged) did the same to its own functions.
Can go: when ``jit_fuser`` compiles at the first call.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_qwen.core_patches.replacement import wrap


def apply() -> None:
    """Wraps ``torch.compile``, once."""
    wrap(torch, "compile", _deferring)


def _deferring(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def compile_(model: Any = None, **options: Any) -> Any:
        if model is None:  # a decorator with options
            return functools.partial(compile_, **options)
        return _at_first_call(plain, model, options) if _is_of_core(model) else plain(model, **options)

    return compile_


def _is_of_core(model: object) -> bool:
    return inspect.isfunction(model) and model.__module__.startswith("megatron.")


def _at_first_call(
    plain: Callable[..., Any], function: Callable[..., Any], options: dict[str, Any]
) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        return plain(function, **options)  # type: ignore[no-any-return]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call
