"""A router without an expert bias does not call the compiled function that would update it.

Replaces: ``TopKRouter._apply_expert_bias`` of ``megatron.core.transformer.moe.router``, by one that looks at
    ``enable_expert_bias`` first. The function looks at it too, and then does nothing.
Needed: with megatron-core 0.19.2, where the function is compiled (NVIDIA/Megatron-LM pull request 1919): every rank of
    a mixture-of-experts run imports and runs the compiler for nothing at its first step, which took 2.2 to 2.3 CPU
    seconds.
When: after megatron.core is imported, on every process.
Can go: when the router looks at ``enable_expert_bias`` before the call.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_qwen.core_patches.replacement import wrap


def apply() -> None:
    """Wraps the method, once."""
    from megatron.core.transformer.moe.router import TopKRouter

    wrap(TopKRouter, "_apply_expert_bias", _where_there_is_one)


def _where_there_is_one(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def apply_expert_bias(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.enable_expert_bias:
            plain(self, *args, **kwargs)

    return apply_expert_bias
